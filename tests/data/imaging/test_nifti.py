"""Reading and writing NIfTI: which files are read, which are refused."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from config.errors import InputError
from data.imaging.nifti import write_volume
from data.imaging.reader import read_header, read_mask, read_volume
from data.imaging.volume import Volume
from tests.data.imaging.images import SPACING, marked

READABLE = ["01_int16_LPS", "03_int16_RAS", "03_int16_PIR", "04_float32", "06_uint16_slope1_inter-1024"]
READABLE += ["08_int16_bigendian", "12_q_s_conflict_LRflip", "14_oblique25", "16_4D_t1"]


@pytest.mark.parametrize("name", READABLE)
def test_stored_variants_of_one_scan_give_one_array(shared, name):
    reference, volume = (read_volume(shared / "nifti" / f"{stem}.nii.gz") for stem in (READABLE[0], name))
    assert volume.array.dtype == np.float32 and volume.array.flags.c_contiguous
    assert volume.array.shape == (79, 64, 64)
    assert np.array_equal(volume.array, reference.array)
    assert volume.array[40, 30, 20] == -172.0  # manifest: voxel (20, 30, 40) of the LPS file
    assert volume.spacing == pytest.approx((3.98734, 4.17187, 4.17187), rel=1e-5)
    if "oblique" not in name:
        assert np.allclose(volume.affine, reference.affine, atol=1e-3)


def test_slope_and_intercept_are_applied(tmp_path):
    header = nib.Nifti1Image(marked().transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0])).header
    header.set_slope_inter(2.0, -24.0)
    header["vox_offset"] = 352
    # nibabel divides by the slope when it saves; writing header and voxels by hand keeps both as given.
    (tmp_path / "scaled.nii").write_bytes(header.binaryblock + b"\0" * 4 + marked().tobytes())
    volume = read_volume(tmp_path / "scaled.nii")
    assert volume.array[3, 4, 5] == 2 * 700 - 24 and volume.array[0, 0, 0] == -2024


def test_a_sheared_sform_is_refused_as_a_tilted_series_is(tmp_path):
    sheared = np.diag([-1.5, -2.0, 3.0, 1.0])
    sheared[1, 2] = 3 * np.tan(np.radians(12))
    nib.save(nib.Nifti1Image(marked().transpose(2, 1, 0), sheared), tmp_path / "scan.nii.gz")
    with pytest.raises(InputError, match=r"tilted by 12\.0 degrees.*dcm2niix"):
        read_header(tmp_path / "scan.nii.gz")


def test_file_without_orientation_is_read_as_stored_with_a_warning(tmp_path, caplog):
    image = nib.Nifti1Image(marked().transpose(2, 1, 0), None)
    image.header.set_zooms((1.5, 2.0, 3.0))
    nib.save(image, tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    assert "no orientation" in caplog.text
    assert volume.array[3, 4, 5] == 700 and volume.spacing == SPACING


@pytest.mark.parametrize("kind", [np.int16, np.uint8, np.float32])
def test_write_then_read_is_the_identity(tmp_path, kind):
    array = (np.arange(120).reshape(4, 5, 6) * 2).astype(kind)
    write_volume(tmp_path / "deep" / "scan.nii.gz", array, SPACING)
    volume = read_volume(tmp_path / "deep" / "scan.nii.gz")
    assert np.array_equal(volume.array, array) and volume.spacing == SPACING and volume.axcodes == "LPS"
    assert read_header(tmp_path / "deep" / "scan.nii.gz").dtype == kind
    turned = np.diag([1.5, 2.0, 3.0, 1.0])
    write_volume(tmp_path / "again.nii.gz", array, SPACING, turned)
    assert np.allclose(read_header(tmp_path / "again.nii.gz").affine, turned)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["scan.nii.gz"]  # no temporary left
    with pytest.raises(ValueError, match="contradicts the affine"):
        write_volume(tmp_path / "x.nii.gz", array, (1.0, 1.0, 1.0), turned)
    with pytest.raises(ValueError, match="int16, uint8 or float32"):
        write_volume(tmp_path / "x.nii.gz", array.astype(np.float64), SPACING)


def test_the_same_volume_gives_the_same_bytes(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(tmp_path / name, marked(), SPACING)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.fixture
def image(tmp_path) -> Volume:
    write_volume(tmp_path / "image.nii.gz", marked(), SPACING)
    return read_volume(tmp_path / "image.nii.gz")


def test_mask_keeps_labels_above_255_and_may_be_empty(tmp_path, image):
    for label, kind in ((0, np.uint8), (255, np.uint8), (513, np.int16)):
        labels = np.where(marked() > 0, label, 0).astype(np.int16)
        write_volume(tmp_path / "mask.nii.gz", labels, image.spacing)
        mask = read_mask(tmp_path / "mask.nii.gz", image)
        assert mask.dtype == kind and np.array_equal(mask, labels)


def test_a_mask_that_lies_elsewhere_is_refused(tmp_path, image):
    moved = image.affine.copy()
    moved[0, 3] += 1.0
    write_volume(tmp_path / "moved.nii.gz", np.zeros((4, 5, 6), dtype=np.uint8), image.spacing, moved)
    with pytest.raises(InputError, match=r"1\.00 mm away"):
        read_mask(tmp_path / "moved.nii.gz", image)


def test_real_lesion_mask_lies_on_its_scan(shared):
    image = read_volume(shared / "ct" / "LungDx-A0001.nii.gz")
    mask = read_mask(shared / "ct" / "LungDx-A0001_boxmask.nii.gz", image)
    slices, rows, columns = np.nonzero(mask)
    assert (slices.min(), slices.max()) == (42, 50)
    # A mass in the left posterior lung: the larger half of both in-plane axes in LPS.
    assert columns.mean() > image.array.shape[2] / 2 and rows.mean() > image.array.shape[1] / 2


def test_the_checksum_of_a_packed_file_is_compared(tmp_path):
    """It is all that tells a flipped bit of the voxels; nibabel stops before it."""
    path = tmp_path / "scan.nii.gz"
    array = (
        np.random.default_rng(0).integers(0, 9000, (40, 41, 42)).astype(np.int16)
    )  # larger than what is read at once
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1, 1, 1])), path)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    nib.load(path).get_fdata()
    with pytest.raises(InputError, match="image data cannot be read .*CRC"):
        read_volume(path)
