"""Small images in every format, for the tests of the readers: one scan, stored in many ways."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from config.nnunet_plans import Intensity, PreprocessPlan, Resampling
from data.imaging.volume import Volume

HU = Intensity(mean=-300.0, std=400.0, percentile_00_5=-1000.0, percentile_99_5=600.0)
# normalisation, without a mask; intensities; reader; orientation; resampling of image and mask
CT = (("CTNormalization",), (False,), (HU,), "SimpleITKIO", "LPS", Resampling(order=3), Resampling(order=1))
PLAN_2D = PreprocessPlan("2d", 2, (1.0, 1.0), (16, 24), (0, 1, 2), *CT)
SPACING = (3.0, 2.0, 1.5)  # z, y, x in mm
ORIENTATIONS = ["".join(axes) for ends in itertools.product("LR", "PA", "SI") for axes in itertools.permutations(ends)]


def marked() -> np.ndarray:
    """(z, y, x) = (4, 5, 6) in HU with one bright voxel at the patient's left, back, top."""
    array = np.full((4, 5, 6), -1000, dtype=np.int16)
    array[3, 4, 5] = 700
    return array


def store_as(path: Path, array_zyx: np.ndarray, axcodes: str, spacing: tuple[float, float, float] = SPACING) -> None:
    """Store an LPS array in another voxel order, the world staying the same."""
    sz, sy, sx = spacing
    image = nib.Nifti1Image(array_zyx.transpose(2, 1, 0), np.diag([-sx, -sy, sz, 1.0]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axcodes))
    nib.save(image.as_reoriented(turn), path)


def write_itk(path: Path, array_zyx: np.ndarray, axcodes: str = "LPS", packed: bool = False) -> None:
    """Store an LPS array by SimpleITK, which names an axis after the end that it comes from, as nibabel does not."""
    image = SimpleITK.GetImageFromArray(array_zyx)
    image.SetSpacing(SPACING[::-1])
    SimpleITK.WriteImage(SimpleITK.DICOMOrient(image, axcodes), path, packed)


def dicom_slice(pixels: np.ndarray, z: float, *, kind: str = CTImageStorage, **tags: object) -> FileDataset:
    """One axial slice: ``pixels`` (row, column) int16 or uint16, as stored; ``tags`` override or, if None, remove."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[str(tags), str(z), str(pixels.sum())])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("slice", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.StudyInstanceUID = "1.2.3.1", "1.2.3"
    data.SeriesNumber, data.SeriesDescription, data.Modality = 2, "Chest", "CT"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.ImagePositionPatient = [0.0, 0.0, z]
    data.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    data.PixelSpacing = list(SPACING[1:])
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = np.ascontiguousarray(pixels).tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    return data


def write_study(folder: Path, volume: Volume, number: int = 1, **tags: object) -> list[Path]:
    """A scan in LPS as a series in a study of its own; the patient's name is Chinese. ``tags``: None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    dz, dy, dx = volume.spacing
    known = {"SpecificCharacterSet": "GB18030", "PatientName": "张^三", "PatientID": f"P{number}", "PatientSex": "M"}
    known |= {"PatientBirthDate": "19600101", "StudyDate": "20260101", "StudyTime": "120000", "StudyID": "1"}
    known |= {"AccessionNumber": f"A{number}", "ReferringPhysicianName": "", "Manufacturer": "none"}
    known |= {"StudyInstanceUID": f"1.2.3.{number}", "SeriesInstanceUID": f"1.2.3.{number}.1"}
    known |= {"FrameOfReferenceUID": f"1.2.3.{number}.2", "PixelSpacing": [dy, dx], "SliceThickness": dz}
    files = []
    for index, plane in enumerate(volume.array):
        stored = (plane.round() + 1024).astype(np.uint16)
        files.append(folder / f"{len(volume.array) - index:03d}.dcm")
        given = known | {"InstanceNumber": index + 1} | tags
        given = {name: value for name, value in given.items() if value is not None}
        dicom_slice(stored, index * dz, **given).save_as(files[-1], enforce_file_format=True)
    return files


def write_series(folder: Path, array_zyx: np.ndarray, prefix: str = "slice", **options: object) -> list[Path]:
    """Store HU (z, y, x) as a series, first file the topmost slice: the order of names is not that of positions."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = (array_zyx.astype(np.int32) + 1024).astype(np.uint16)
    files = [folder / f"{prefix}{number:03d}.dcm" for number in range(len(stored), 0, -1)]
    for index, file in enumerate(files):
        dicom_slice(stored[index], index * SPACING[0], **options).save_as(file, enforce_file_format=True)
    return files
