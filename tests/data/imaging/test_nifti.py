"""Reading and writing NIfTI: which files are read, which are refused, and that left stays left."""

from __future__ import annotations

import gzip
import json
import logging

import nibabel as nib
import numpy as np
import pytest

from config.errors import InputError
from data.imaging.nifti import write_volume
from data.imaging.reader import read_mask, read_volume
from data.imaging.volume import Volume

READABLE = [
    "01_int16_LPS.nii.gz",
    "03_int16_RAS.nii.gz",
    "03_int16_PIR.nii.gz",
    "04_float32.nii.gz",
    "06_uint16_slope1_inter-1024.nii.gz",
    "08_int16_bigendian.nii.gz",
    "12_q_s_conflict_LRflip.nii.gz",
    "14_oblique25.nii.gz",
    "16_4D_t1.nii.gz",
]
REFUSED = {
    "19_float_nan_inf.nii.gz": r"20224 voxels are NaN and 5056 infinite",
    "90_truncated.nii.gz": r"truncated",
    "93_empty.nii.gz": r"empty \(0 bytes\)",
}


@pytest.fixture
def marked() -> np.ndarray:
    """(z, y, x) = (4, 5, 6) with one bright voxel at the patient's left, back, top."""
    array = np.full((4, 5, 6), -1000, dtype=np.int16)
    array[3, 4, 5] = 700
    return array


def _store_as(path, array_zyx: np.ndarray, axcodes: str) -> None:
    """Store an LPS array in another voxel order, the world staying the same."""
    image = nib.Nifti1Image(array_zyx.transpose(2, 1, 0), np.diag([-1.5, -2.0, 3.0, 1.0]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axcodes))
    nib.save(image.as_reoriented(turn), path)


def test_every_reference_file_is_either_read_or_refused(shared):
    manifest = json.loads((shared / "nifti" / "manifest.json").read_text(encoding="utf-8"))
    assert set(READABLE) | set(REFUSED) == set(manifest)


@pytest.mark.parametrize("name", READABLE)
def test_stored_variants_of_one_scan_give_one_array(shared, name):
    reference = read_volume(shared / "nifti" / READABLE[0])
    volume = read_volume(shared / "nifti" / name)
    assert volume.array.dtype == np.float32 and volume.array.flags.c_contiguous
    assert volume.array.shape == (79, 64, 64)
    assert np.array_equal(volume.array, reference.array)
    assert volume.array[40, 30, 20] == -172.0  # manifest: voxel (20, 30, 40) of the LPS file
    assert volume.spacing == pytest.approx((3.98734, 4.17187, 4.17187), rel=1e-5)
    if "oblique" not in name:
        assert np.allclose(volume.affine, reference.affine, atol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_files_are_refused_by_name_in_one_line(shared, name):
    with pytest.raises(InputError, match=REFUSED[name]) as refusal:
        read_volume(shared / "nifti" / name)
    assert name in str(refusal.value) and "\n" not in str(refusal.value)


def test_conflicting_forms_are_said_aloud(shared, caplog):
    with caplog.at_level(logging.WARNING):
        read_volume(shared / "nifti" / "12_q_s_conflict_LRflip.nii.gz")
    assert "check left and right" in caplog.text


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "LAS", "PIR", "SRP", "IPL"])
def test_left_back_top_is_found_whatever_the_stored_order(tmp_path, marked, axcodes):
    _store_as(tmp_path / "scan.nii.gz", marked, axcodes)
    lps = read_volume(tmp_path / "scan.nii.gz")
    assert lps.array[3, 4, 5] == 700 and lps.stored_axcodes == axcodes
    assert lps.spacing == pytest.approx((3.0, 2.0, 1.5))
    ras = read_volume(tmp_path / "scan.nii.gz", orientation="RAS")
    assert ras.array[3, 0, 0] == 700
    # Both affines must put the bright voxel at the same place in the world.
    world = np.array([-7.5, -8.0, 9.0, 1.0])
    assert np.allclose(lps.affine @ [5, 4, 3, 1], world) and np.allclose(ras.affine @ [0, 0, 3, 1], world)


def test_slope_and_intercept_are_applied(tmp_path, marked):
    image = nib.Nifti1Image(marked.transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]))
    image.header.set_slope_inter(2.0, -24.0)
    raw = image.header.copy()
    raw["vox_offset"] = 352
    # nibabel divides by the slope when it saves; writing header and voxels by hand keeps both as given.
    content = raw.binaryblock + b"\0" * 4 + marked.transpose(2, 1, 0).tobytes(order="F")
    (tmp_path / "scaled.nii").write_bytes(content)
    volume = read_volume(tmp_path / "scaled.nii")
    assert volume.array[3, 4, 5] == 2 * 700 - 24 and volume.array[0, 0, 0] == -2024


def test_missing_folder_wrong_name_and_wrong_content(tmp_path):
    with pytest.raises(InputError, match="not found"):
        read_volume(tmp_path / "absent.nii.gz")
    with pytest.raises(InputError, match="folder"):
        read_volume(tmp_path)
    (tmp_path / "scan.dcm").write_bytes(b"x")
    with pytest.raises(InputError, match="not a readable DICOM"):
        read_volume(tmp_path / "scan.dcm")
    (tmp_path / "text.nii.gz").write_bytes(gzip.compress(b"this is no image" * 100))
    with pytest.raises(InputError, match="not a readable NIfTI"):
        read_volume(tmp_path / "text.nii.gz")
    (tmp_path / "plain.nii.gz").write_bytes(b"not even gzip")
    with pytest.raises(InputError, match="not a readable NIfTI"):
        read_volume(tmp_path / "plain.nii.gz")


def test_several_volumes_flat_images_and_constants_are_refused(tmp_path):
    affine = np.eye(4)
    series = np.arange(2 * 3 * 4 * 2, dtype=np.int16).reshape(2, 3, 4, 2)
    for name, array, message in (
        ("series", series, "expected three axes"),
        ("flat", series[:, :, 0, 0], "expected three axes"),
        ("constant", np.full((3, 3, 3), 7, dtype=np.int16), "every voxel is 7"),
        ("complex", series[..., 0].astype(np.complex64), "expected integers or floats"),
    ):
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
        with pytest.raises(InputError, match=message):
            read_volume(tmp_path / f"{name}.nii.gz")


def test_header_that_announces_terabytes_is_refused_before_allocation(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((30000, 30000, 30000))
    header.set_sform(np.eye(4), code=1)
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(header.binaryblock + b"\0" * 1000))
    with pytest.raises(InputError, match="more than a file of"):
        read_volume(tmp_path / "bomb.nii.gz")


def test_singular_and_absurd_affines_are_refused(tmp_path, marked):
    image = nib.Nifti1Image(marked, None)
    for affine, message in (
        (np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "not independent"),
        (np.diag([1.0, 1.0, 5000.0, 1.0]), "voxel sizes"),
    ):
        image.header.set_sform(affine, code=1)
        image.header.set_qform(None, code=0)
        (tmp_path / "bad.nii").write_bytes(image.header.binaryblock + b"\0" * 4 + marked.tobytes())
        with pytest.raises(InputError, match=message):
            read_volume(tmp_path / "bad.nii")


def test_file_without_orientation_is_read_as_stored_with_a_warning(tmp_path, marked, caplog):
    image = nib.Nifti1Image(marked.transpose(2, 1, 0), None)
    image.header.set_zooms((1.5, 2.0, 3.0))
    nib.save(image, tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    assert "no orientation" in caplog.text
    assert volume.array[3, 4, 5] == 700 and volume.spacing == (3.0, 2.0, 1.5)


def test_write_then_read_is_the_identity(tmp_path, marked):
    write_volume(tmp_path / "deep" / "scan.nii.gz", marked, (3.0, 2.0, 1.5))
    volume = read_volume(tmp_path / "deep" / "scan.nii.gz")
    assert np.array_equal(volume.array, marked) and volume.spacing == (3.0, 2.0, 1.5)
    assert volume.stored_axcodes == "LPS"
    write_volume(tmp_path / "again.nii.gz", marked, volume.spacing, volume.affine)
    assert np.allclose(read_volume(tmp_path / "again.nii.gz").affine, volume.affine)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["scan.nii.gz"]  # no temporary left
    with pytest.raises(ValueError, match="int16, uint8 or float32"):
        write_volume(tmp_path / "x.nii.gz", marked.astype(np.float64), (1.0, 1.0, 1.0))


def _image(tmp_path, marked) -> Volume:
    write_volume(tmp_path / "image.nii.gz", marked, (3.0, 2.0, 1.5))
    return read_volume(tmp_path / "image.nii.gz")


def test_mask_follows_its_image_through_reorientation(tmp_path, marked):
    _store_as(tmp_path / "mask.nii.gz", (marked > 0).astype(np.uint8), "RAS")
    mask = read_mask(tmp_path / "mask.nii.gz", _image(tmp_path, marked))
    assert mask.dtype == np.uint8 and mask.sum() == 1 and mask[3, 4, 5] == 1


def test_mask_keeps_labels_above_255_and_may_be_empty(tmp_path, marked):
    image = _image(tmp_path, marked)
    labels = np.zeros(marked.shape, dtype=np.int16)
    write_volume(tmp_path / "mask.nii.gz", labels, image.spacing)
    assert read_mask(tmp_path / "mask.nii.gz", image).max() == 0
    labels[0, 0, 0] = 513
    write_volume(tmp_path / "mask.nii.gz", labels, image.spacing)
    mask = read_mask(tmp_path / "mask.nii.gz", image)
    assert mask.dtype == np.int16 and mask[0, 0, 0] == 513


def test_masks_on_another_grid_or_with_fractions_are_refused(tmp_path, marked):
    image = _image(tmp_path, marked)
    write_volume(tmp_path / "small.nii.gz", np.zeros((4, 5, 5), dtype=np.uint8), image.spacing)
    with pytest.raises(InputError, match="own grid"):
        read_mask(tmp_path / "small.nii.gz", image)
    moved = image.affine.copy()
    moved[0, 3] += 1.0
    write_volume(tmp_path / "moved.nii.gz", np.zeros((4, 5, 6), dtype=np.uint8), image.spacing, moved)
    with pytest.raises(InputError, match=r"1\.00 mm away"):
        read_mask(tmp_path / "moved.nii.gz", image)
    for value, message in ((0.5, "fractions"), (np.nan, "whole labels"), (-1.0, "whole labels")):
        labels = np.zeros((6, 5, 4), dtype=np.float32)
        labels[1, 1, 1] = value
        nib.save(nib.Nifti1Image(labels, image.affine), tmp_path / "odd.nii.gz")
        with pytest.raises(InputError, match=message):
            read_mask(tmp_path / "odd.nii.gz", image)


def test_real_lesion_mask_lies_on_its_scan(shared):
    image = read_volume(shared / "ct" / "LungDx-A0001.nii.gz")
    mask = read_mask(shared / "ct" / "LungDx-A0001_boxmask.nii.gz", image)
    slices, rows, columns = np.nonzero(mask)
    assert (slices.min(), slices.max()) == (42, 50)
    # A mass in the left posterior lung: the larger half of both in-plane axes in LPS.
    assert columns.mean() > image.array.shape[2] / 2 and rows.mean() > image.array.shape[1] / 2
