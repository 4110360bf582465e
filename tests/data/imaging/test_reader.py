"""One scan in every format, orientation and number type gives one array; headers agree with it."""

from __future__ import annotations

import gzip
import json
import math

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from config.errors import InputError
from data.imaging.reader import files_of, read_header, read_mask, read_volume
from tests.data.imaging.images import ORIENTATIONS, SPACING, marked, store_as

INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
FLOATS = [np.float32, np.float64]
REFUSED = {
    "19_float_nan_inf.nii.gz": "20224 voxels are NaN and 5056 infinite",
    "90_truncated.nii.gz": "truncated",
    "93_empty.nii.gz": r"empty \(0 bytes\)",
}


def itk_image(array: np.ndarray, axcodes: str = "LPS") -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    return SimpleITK.DICOMOrient(image, axcodes)


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_left_back_top_is_found_whatever_the_stored_order(tmp_path, axcodes):
    path = tmp_path / "scan.nii.gz"
    store_as(path, marked(), axcodes)
    volume, header = read_volume(path), read_header(path)
    assert np.array_equal(volume.array, marked()) and volume.spacing == pytest.approx(SPACING)
    assert header.axcodes == axcodes
    assert header.spacing == volume.spacing and header.extent_mm == pytest.approx((12, 10, 9))
    ras = read_volume(path, "RAS")
    assert np.array_equal(ras.array, marked()[:, ::-1, ::-1])
    # Both affines put the bright voxel at the same place in the world.
    assert np.allclose(volume.affine @ [5, 4, 3, 1], [-7.5, -8, 9, 1]) and np.allclose(
        ras.affine @ [0, 0, 3, 1], [-7.5, -8, 9, 1]
    )


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "SRP", "IPL"])
def test_metaimage_and_nrrd(tmp_path, suffix, compressed, axcodes):
    path = tmp_path / f"scan{suffix}"
    # SimpleITK names an axis after the end that it comes from, nibabel after the one that it goes to.
    SimpleITK.WriteImage(itk_image(marked(), axcodes), path, compressed)
    store_as(tmp_path / "scan.nii.gz", marked(), "LPS")
    volume, same = read_volume(path), read_volume(tmp_path / "scan.nii.gz")
    assert np.array_equal(volume.array, marked()) and read_header(path).notes == ()
    assert np.allclose(volume.affine, same.affine) and volume.spacing == pytest.approx(SPACING)
    SimpleITK.WriteImage(itk_image((marked() > 0).astype(np.uint8), axcodes), tmp_path / f"mask{suffix}")
    assert read_mask(tmp_path / f"mask{suffix}", same)[3, 4, 5] == 1


@pytest.mark.parametrize("kind", INTEGERS + FLOATS)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_number_types(tmp_path, kind, suffix):
    array = np.arange(120).reshape(4, 5, 6).astype(kind)
    path = tmp_path / f"scan{suffix}"
    if suffix.startswith(".nii"):
        nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), np.diag([-1.5, -2, 3, 1]), dtype=kind), path)
    else:
        SimpleITK.WriteImage(itk_image(array), path)
    volume = read_volume(path)
    assert volume.array.dtype == np.float32 and np.array_equal(volume.array, array)
    assert read_header(path).dtype == np.dtype(kind)


@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair, nib.Nifti2Pair])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_nifti_1_and_2_single_and_pair_both_byte_orders(tmp_path, image_class, packed, order):
    pair = "Pair" in image_class.__name__
    header = image_class.header_class(endianness=order)
    header.set_data_dtype(np.dtype(np.int16).newbyteorder(order))
    image = image_class(marked().transpose(2, 1, 0), np.diag([-1.5, -2, 3, 1]), header)
    ending = ".gz" if packed else ""
    path = tmp_path / f"scan{'.hdr' if pair else '.nii'}{ending}"
    nib.save(image, path)
    assert np.array_equal(read_volume(path).array, marked()) and read_header(path).axcodes == "LPS"
    if pair:
        other = tmp_path / f"scan.img{ending}"
        assert np.array_equal(read_volume(other).array, marked())
        assert files_of(path) == files_of(other) == [path, other]
        other.unlink()
        with pytest.raises(InputError, match=r"half of a pair, and scan\.img"):
            read_header(path)


def test_a_pair_in_other_capitals_is_found(tmp_path):
    nib.save(nib.Nifti1Pair(marked().transpose(2, 1, 0), np.diag([-1.5, -2, 3, 1])), tmp_path / "scan.hdr")
    (tmp_path / "scan.img").rename(tmp_path / "scan.IMG")
    assert files_of(tmp_path / "scan.hdr")[1].name == "scan.IMG"


# ---------------------------------------------------------------- the reference files


def test_headers_of_the_reference_files_say_what_the_manifest_says(shared):
    manifest = json.loads((shared / "nifti" / "manifest.json").read_text(encoding="utf-8"))
    for name, expected in manifest.items():
        path = shared / "nifti" / name
        if name in REFUSED:
            with pytest.raises(InputError, match=REFUSED[name]) as refusal:
                read_volume(path)
            assert name in str(refusal.value) and "\n" not in str(refusal.value)
        if "shape" not in expected:
            with pytest.raises(InputError, match=REFUSED[name]):
                read_header(path)
            continue
        header = read_header(path)
        assert list(header.shape) == expected["shape"][:3] and header.axcodes == expected["axcodes"]
        assert header.dtype == np.dtype(expected["dtype"])
        assert np.allclose(header.affine, expected["affine"], atol=1e-3)
        assert bool(header.notes) == ("conflict" in name)
        if math.isfinite(expected["mean"]):
            array = read_volume(path).array
            assert (array.min(), array.max()) == (expected["min"], expected["max"])
            assert array.mean(dtype=np.float64) == pytest.approx(expected["mean"])


# ---------------------------------------------------------------- doubt and damage


def placed(tmp_path, sform: np.ndarray | None, qform: np.ndarray | None, sform_code=1, qform_code=1) -> str:
    image = nib.Nifti1Image(marked().transpose(2, 1, 0), None)
    image.set_sform(sform, code=sform_code if sform is not None else 0)
    image.set_qform(qform, code=qform_code if qform is not None else 0)
    nib.save(image, tmp_path / "scan.nii.gz")
    return "; ".join(read_header(tmp_path / "scan.nii.gz").notes)


def test_the_sform_counts_and_what_the_qform_contradicts_is_said(tmp_path):
    lps, ras = np.diag([-1.5, -2, 3, 1.0]), np.diag([1.5, -2, 3, 1.0])
    assert placed(tmp_path, lps, lps) == ""
    assert "sform says LPS, qform RPS" in placed(tmp_path, lps, ras)
    assert np.array_equal(read_volume(tmp_path / "scan.nii.gz").array, marked())
    assert placed(tmp_path, None, ras) == ""
    assert np.array_equal(read_volume(tmp_path / "scan.nii.gz").array, marked()[:, :, ::-1]), "the qform alone counts"
    assert "no orientation" in placed(tmp_path, None, None)
    moved = lps.copy()
    moved[0, 3] = 40
    assert "40.0 mm apart" in placed(tmp_path, lps, moved)
    angle = np.radians(10)
    turned = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    oblique = np.eye(4)
    oblique[:3, :3] = turned @ lps[:3, :3]
    assert "10.0 degrees" in placed(tmp_path, lps, oblique)


def test_a_short_file_is_noticed_without_reading_voxels(tmp_path):
    noise = np.random.default_rng(0).integers(-1000, 1000, (10, 20, 30)).astype(np.int16)
    store_as(tmp_path / "scan.nii", noise, "LPS")
    whole = (tmp_path / "scan.nii").read_bytes()
    (tmp_path / "short.nii").write_bytes(whole[:-2])
    (tmp_path / "short.nii.gz").write_bytes(gzip.compress(whole[:-2]))
    (tmp_path / "cut.nii.gz").write_bytes(gzip.compress(whole)[:-30])
    for name in ("short.nii", "short.nii.gz", "cut.nii.gz"):
        with pytest.raises(InputError, match="truncated"):
            read_header(tmp_path / name)
        with pytest.raises(InputError, match="truncated"):
            read_volume(tmp_path / name)
    # Two gzip members, and bytes after the voxels, are whole files all the same.
    (tmp_path / "two.nii.gz").write_bytes(gzip.compress(whole[:400]) + gzip.compress(whole[400:]))
    (tmp_path / "long.nii.gz").write_bytes(gzip.compress(whole + b"\0" * 100))
    for name in ("two.nii.gz", "long.nii.gz"):
        assert read_header(tmp_path / name).shape == (30, 20, 10)
        assert np.array_equal(read_volume(tmp_path / name).array, noise)


def huge_nifti(tmp_path) -> None:
    header = nib.Nifti2Header()
    header["dim"][:8] = [7, *[2**62] * 3, 1, 1, 1, 1]
    header["sform_code"] = 1
    header["srow_x"], header["srow_y"], header["srow_z"] = np.eye(4)[:3]
    (tmp_path / "huge.nii.gz").write_bytes(gzip.compress(header.binaryblock + b"\0" * 4000))


def huge_mha(tmp_path) -> None:
    text = f"ObjectType = Image\nNDims = 3\nDimSize = {10**21} {10**21} {10**21}\nElementType = MET_SHORT\n"
    (tmp_path / "huge.mha").write_bytes(f"{text}ElementDataFile = LOCAL\n".encode() + b"\0" * 4000)


def huge_nrrd(tmp_path) -> None:
    text = f"NRRD0004\ntype: short\ndimension: 3\nsizes: {10**21} {10**21} {10**21}\nencoding: gzip\n\n"
    (tmp_path / "huge.nrrd").write_bytes(text.encode() + b"\0" * 4000)


@pytest.mark.parametrize("make", [huge_nifti, huge_mha, huge_nrrd])
def test_a_header_that_promises_more_than_the_universe_is_refused_before_allocation(tmp_path, make):
    make(tmp_path)
    [path] = tmp_path.iterdir()
    for read in (read_header, read_volume):
        with pytest.raises(InputError, match="more than a file of"):
            read(path)
