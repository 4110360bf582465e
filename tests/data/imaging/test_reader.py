"""One scan in every format, orientation and number type gives one array; headers agree with it."""

from __future__ import annotations

import gzip
import itertools
import json
import math

import nibabel as nib
import numpy as np
import pytest

from config.errors import InputError
from data.imaging.reader import files_of, read_header, read_mask, read_volume, scans_below
from tests.data.imaging.images import ORIENTATIONS, SPACING, marked, store_as, write_itk, write_series

KINDS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]
REFUSED = {
    "19_float_nan_inf.nii.gz": "20224 voxels are NaN and 5056 infinite",
    "90_truncated.nii.gz": "truncated",
    "93_empty.nii.gz": r"empty \(0 bytes\)",
}


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_left_back_top_is_found_whatever_the_stored_order(tmp_path, axcodes):
    path = tmp_path / "scan.nii.gz"
    store_as(path, marked(), axcodes)
    volume, header = read_volume(path), read_header(path)
    assert np.array_equal(volume.array, marked()) and volume.spacing == pytest.approx(SPACING)
    assert header.axcodes == axcodes and header.spacing == volume.spacing
    assert header.extent_mm == pytest.approx((12, 10, 9))
    ras = read_volume(path, "RAS")
    assert np.array_equal(ras.array, marked()[:, ::-1, ::-1])
    for place in (volume.affine @ [5, 4, 3, 1], ras.affine @ [0, 0, 3, 1]):  # the bright voxel's, in the world
        assert np.allclose(place, [-7.5, -8, 9, 1])


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "SRP", "IPL"])
def test_metaimage_and_nrrd(tmp_path, suffix, compressed, axcodes):
    path = tmp_path / f"scan{suffix}"
    write_itk(path, marked(), axcodes, compressed)
    store_as(tmp_path / "scan.nii.gz", marked(), "LPS")
    volume, same = read_volume(path), read_volume(tmp_path / "scan.nii.gz")
    assert np.array_equal(volume.array, marked()) and read_header(path).notes == ()
    assert np.allclose(volume.affine, same.affine) and volume.spacing == pytest.approx(SPACING)
    write_itk(tmp_path / f"mask{suffix}", (marked() > 0).astype(np.uint8), axcodes)
    assert read_mask(tmp_path / f"mask{suffix}", same)[3, 4, 5] == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_number_types(tmp_path, kind, suffix):
    array = np.arange(120).reshape(4, 5, 6).astype(kind)
    path = tmp_path / f"scan{suffix}"
    if suffix.startswith(".nii"):
        nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), np.diag([-1.5, -2, 3, 1]), dtype=kind), path)
    else:
        write_itk(path, array)
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
    assert files_of(tmp_path / "scan.hdr")[1].samefile(tmp_path / "scan.IMG")  # Windows finds it under either name


def test_headers_of_the_reference_files_say_what_the_manifest_says(shared):
    manifest = json.loads((shared / "nifti" / "manifest.json").read_text(encoding="utf-8"))
    for name, expected in manifest.items():
        path = shared / "nifti" / name
        for read in (read_volume, read_header)[: (name in REFUSED) + ("shape" not in expected)]:
            with pytest.raises(InputError, match=rf"{name}.*{REFUSED[name]}"):
                read(path)
        if "shape" not in expected:
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


def placed(tmp_path, sform: np.ndarray | None, qform: np.ndarray | None) -> str:
    image = nib.Nifti1Image(marked().transpose(2, 1, 0), None)
    image.set_sform(sform, code=int(sform is not None))
    image.set_qform(qform, code=int(qform is not None))
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
    moved = nib.affines.from_matvec(lps[:3, :3], [40, 0, 0])
    assert "40.0 mm apart" in placed(tmp_path, lps, moved)
    oblique = nib.affines.from_matvec(nib.eulerangles.euler2mat(x=np.radians(10))) @ lps
    assert "10.0 degrees" in placed(tmp_path, lps, oblique)


def test_a_short_file_is_noticed_without_reading_voxels(tmp_path):
    noise = np.random.default_rng(0).integers(-1000, 1000, (10, 20, 30)).astype(np.int16)
    store_as(tmp_path / "scan.nii", noise, "LPS")
    whole = (tmp_path / "scan.nii").read_bytes()
    short = {"a.nii": whole[:-2], "a.nii.gz": gzip.compress(whole[:-2]), "b.nii.gz": gzip.compress(whole)[:-30]}
    for (name, content), read in itertools.product(short.items(), (read_header, read_volume)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="truncated"):
            read(tmp_path / name)
    # Two gzip members, and bytes after the voxels, are whole files all the same.
    for content in (gzip.compress(whole[:400]) + gzip.compress(whole[400:]), gzip.compress(whole + b"\0" * 100)):
        (tmp_path / "whole.nii.gz").write_bytes(content)
        assert read_header(tmp_path / "whole.nii.gz").shape == (30, 20, 10)
        assert np.array_equal(read_volume(tmp_path / "whole.nii.gz").array, noise)


HUGE = " ".join([str(10**21)] * 3)


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("huge.mha", f"NDims = 3\nDimSize = {HUGE}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"),
        ("huge.nrrd", f"NRRD0004\ntype: short\ndimension: 3\nsizes: {HUGE}\nencoding: gzip\n\n"),
        ("huge.nii", ""),
    ],
)
def test_a_header_that_promises_more_than_the_universe_is_refused_before_allocation(tmp_path, name, header):
    nifti = nib.Nifti2Header()
    nifti["dim"][:8] = [7, *[2**62] * 3, 1, 1, 1, 1]
    path = tmp_path / name
    path.write_bytes((header.encode() or nifti.binaryblock) + b"\0" * 4000)
    for read in (read_header, read_volume):
        with pytest.raises(InputError, match="more than a file of"):
            read(path)


def test_every_scan_of_a_folder_is_found_once(tmp_path):
    store_as(tmp_path / "b.nii.gz", marked(), "LPS")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_itk(tmp_path / "deep" / "er" / "a.mha", marked())
    nib.save(nib.Nifti1Pair(marked().transpose(2, 1, 0), np.eye(4)), tmp_path / "deep" / "pair.hdr")
    hidden, out = tmp_path / "deep" / ".hidden.nii.gz", tmp_path / "out" / "case.nii.gz"
    out.parent.mkdir()
    for file in (hidden, out, tmp_path / "notes.txt", tmp_path / "deep" / "broken.NRRD"):
        file.write_bytes(b"nothing")
    series = tmp_path / "patient"
    write_series(series, marked(), "one")
    write_series(series, marked(), "two", SeriesInstanceUID="1.2.3.7", SeriesNumber=7)
    write_series(series, marked()[:2], "scout", SeriesInstanceUID="1.2.3.9", ImageType=["ORIGINAL", "LOCALIZER"])
    write_series(series / "below", marked(), SeriesInstanceUID="1.2.3.8", SeriesNumber=None)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.dcm").write_bytes(b"nothing")
    found = scans_below(tmp_path, out.parent)
    names = [scan.name.split("_")[0] for scan in found]
    assert names == sorted(names) and len({scan.name for scan in found}) == len(found)
    expected = ["b.nii.gz", "bad", "deep/broken.NRRD", "deep/er/a.mha", "deep/pair.hdr"]
    assert names == [*expected, "patient/below/series", "patient/series2", "patient/series7"]
    assert [scan.name for scan in found if scan.problem] == ["bad"]
    whole = [scan for scan in found if not scan.problem and "broken" not in scan.name]
    assert all(read_volume(scan.path).array.shape == marked().shape for scan in whole)


def test_a_series_that_somebody_would_miss_is_a_scan_with_a_problem(tmp_path):
    write_series(tmp_path / "frames", marked(), NumberOfFrames=40)
    write_series(tmp_path / "other", marked(), Modality="OT")
    write_series(tmp_path / "both", marked())
    write_series(tmp_path / "both", marked(), "mr", SeriesInstanceUID="1.2.3.2", Modality="MR")
    write_series(tmp_path / "labels", marked(), Modality="SEG")
    found = {scan.name.split("/")[0]: scan.problem for scan in scans_below(tmp_path)}
    assert found.keys() == {"frames", "other", "both"} and not found["both"]
    assert "several frames" in found["frames"] and "modality OT, expected CT" in found["other"]


def test_a_locked_file_of_another_program_stops_nothing(tmp_path, monkeypatch):
    write_series(tmp_path / "s", marked())
    (tmp_path / "s" / "~$cases.xlsx").write_bytes(b"owner")
    real = type(tmp_path).open

    def locked(self, *args, **options):
        if self.name.startswith("~$"):
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **options)

    monkeypatch.setattr(type(tmp_path), "open", locked)
    assert [scan.problem for scan in scans_below(tmp_path)] == [""]
