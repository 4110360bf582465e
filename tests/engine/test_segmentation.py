"""``slice_policy: nnunet``: the network's own labels, made once, kept, and found again."""

from __future__ import annotations

import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from config.errors import InputError
from config.nnunet_plans import PreprocessPlan
from config.schema import Config, build_config
from data.cache import CachedVolume, VolumeCache
from data.imaging.nifti import write_volume
from data.segmentation_scores import ComparedCase
from data.tables.caption_table import CaptionRow
from data.view_selection import ViewSelection
from engine import segmentation
from engine.segmentation import SegmentedCache, describe_segmentation, open_cache, prepare_cases, segment_all
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.sliding_window import sliding_window
from models.nnunet.unet import SegmentationUNet


def logits_of(checkpoint: Path, volume: CachedVolume, plan: PreprocessPlan) -> torch.Tensor:
    """(classes, z, y, x); of a 2-D network slice by slice."""
    network = SegmentationUNet.from_checkpoint(load_nnunet_checkpoint(checkpoint)).eval()
    image = torch.from_numpy(np.asarray(volume.image))
    if plan.dim == 3:
        return sliding_window(network, image[None], plan.patch_size)[0]
    return torch.stack([sliding_window(network, plane[None], plan.patch_size)[0] for plane in image.unbind(1)], dim=1)


@pytest.fixture(scope="module", params=["2d_plain", "3d_plain"])
def checkpoint(request, tmp_path_factory, assets: Path, scan: Path) -> Path:
    """A tiny nnU-Net whose head is moved so that a tenth of the scan is lesion: untrained, it finds nothing."""
    tmp_path = tmp_path_factory.mktemp("network")
    path = assets / "nnunet_tiny" / request.param / "fold_0" / "checkpoint_best.pth"
    plan = plan_of(path)
    logits = logits_of(path, VolumeCache(tmp_path / "cache", plan).get(scan), plan)
    content = torch.load(path, weights_only=False)
    margin = float((logits[1] - logits[0]).quantile(0.9))
    for name, weight in content["network_weights"].items():
        if "seg_layers" in name and name.endswith("bias"):
            weight[1] -= margin
    torch.save(content, tmp_path / "moved.pth")
    return tmp_path / "moved.pth"


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    tmp_path = tmp_path_factory.mktemp("scan")
    rng = np.random.default_rng(3)
    hu = np.clip(rng.normal(-600, 400, (16, 60, 66)), -1000, 600)
    hu[8:12, 20:36, 20:36] = 300
    write_volume(tmp_path / "scan.nii.gz", hu.astype(np.int16), (3.0, 1.2, 1.2))
    return tmp_path / "scan.nii.gz"


@pytest.fixture(autouse=True)
def fresh_network():
    segmentation._network.cache_clear()


def configuration(tmp_path: Path, checkpoint: Path, **keys: object) -> Config:
    values = {"cache_dir": str(tmp_path / "cache"), "nnunet_encoder_checkpoint": str(checkpoint)}
    return build_config({**values, "slice_policy": "nnunet", **keys}, "test")


def plan_of(checkpoint: Path) -> PreprocessPlan:
    source = load_nnunet_checkpoint(checkpoint)
    return PreprocessPlan.from_nnunet(source.plans, source.configuration)


def test_labels_are_the_networks_and_the_slices_follow_them(tmp_path, checkpoint, scan):
    plan = plan_of(checkpoint)
    cache = open_cache(configuration(tmp_path, checkpoint), plan)
    volume = cache.get(scan)
    labels = np.asarray(volume.mask)
    expected = logits_of(checkpoint, volume, plan).argmax(0)
    # Several slices at a time are rounded in another order than one: a voxel between two labels may fall either way.
    assert (labels != expected.numpy()).mean() < 1e-3 and labels.dtype == np.uint8
    assert labels.any(), "a network that finds nothing would prove nothing here"
    assert np.array_equal(volume.lesion_voxels, np.count_nonzero(labels, axis=(1, 2)))
    assert volume.lesions and volume.lesions[0].voxels <= np.count_nonzero(labels)
    if plan.dim == 2:
        chosen = ViewSelection(plan, (8, 8), 1, "nnunet").chosen_slices(volume)
        assert chosen == [int(volume.lesion_voxels.argmax())]


def test_made_once_kept_and_found_by_another_process(tmp_path, checkpoint, scan, monkeypatch):
    cache = open_cache(configuration(tmp_path, checkpoint), plan_of(checkpoint))
    assert cache.ensure(scan) and not cache.ensure(scan)
    labels = np.asarray(cache.get(scan).mask)
    monkeypatch.setattr(segmentation, "segment", lambda *_: pytest.fail("segmented again"))
    assert np.array_equal(pickle.loads(pickle.dumps(cache)).get(scan).mask, labels)
    assert segment_all(cache, [(scan, None)]) == 0


def test_another_network_or_image_is_another_segmentation(tmp_path, checkpoint, scan):
    cache = open_cache(configuration(tmp_path, checkpoint), plan_of(checkpoint))
    other_file = tmp_path / "other.pth"
    content = torch.load(checkpoint, weights_only=False)
    content["current_epoch"] = 77
    torch.save(content, other_file)
    other = SegmentedCache(cache.volumes, other_file)
    assert other.entry(scan) != cache.entry(scan)
    copy = tmp_path / "copy.nii.gz"
    shutil.copy(scan, copy)
    assert cache.entry(copy) == cache.entry(scan), "the same content is the same case"
    assert segment_all(cache, [(scan, None), (copy, None)]) == 1 and segment_all(cache, [(copy, None)]) == 0
    prepare_cases(other, [CaptionRow(2, scan, "", "", None), CaptionRow(3, copy, "", "", None)])
    assert other.entry(scan).is_dir() and len(list((cache.root / "segmentation").iterdir())) == 2


def test_several_scans_at_once_get_the_labels_of_one_after_the_other(tmp_path, checkpoint, scan):
    scans, rng = [scan], np.random.default_rng(4)
    for number in range(4):
        scans.append(tmp_path / f"scan_{number}.nii.gz")
        hu = np.clip(rng.normal(-600, 400, (16, 60, 66)), -1000, 600).astype(np.int16)
        write_volume(scans[-1], hu, (3.0, 1.2, 1.2))
    together = open_cache(configuration(tmp_path / "together", checkpoint), plan_of(checkpoint))
    alone = open_cache(configuration(tmp_path / "alone", checkpoint), plan_of(checkpoint))
    threads = torch.get_num_threads()
    assert segment_all(together, [(path, None) for path in scans]) == 5 and torch.get_num_threads() == threads
    for path in scans:
        one, other = together.get(path), alone.get(path)
        assert (np.asarray(one.mask) != np.asarray(other.mask)).mean() < 1e-3 and np.asarray(one.mask).any()


def test_a_list_of_one_label_is_no_region(tmp_path, checkpoint):
    content = torch.load(checkpoint, weights_only=False)
    for labels, regions in (({"background": 0, "lesion": [1]}, False), ({"background": 0, "lesion": [1, 2]}, True)):
        content["init_args"]["dataset_json"]["labels"] = labels
        torch.save(content, tmp_path / f"{regions}.pth")
        network = segmentation._network(tmp_path / f"{regions}.pth", plan_of(checkpoint))
        assert network.regions is regions


@pytest.mark.parametrize("damage", ["labels", "meta", "cut"])
def test_damaged_labels_are_made_again(tmp_path, checkpoint, scan, damage, caplog):
    cache = open_cache(configuration(tmp_path, checkpoint), plan_of(checkpoint))
    labels = np.asarray(cache.get(scan).mask)
    file = cache.entry(scan) / ("meta.json" if damage == "meta" else "mask.bin")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    damaged = {"labels": data, "meta": b"{", "cut": data[:-1]}[damage]
    file.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(cache.read(scan, None, lambda volume: np.asarray(volume.mask)), labels)
    assert "damaged and made again" in caplog.text
    file.write_bytes(damaged)
    assert segment_all(cache, [(scan, None)], verify=damage == "labels") == 1
    assert np.array_equal(np.asarray(cache.get(scan).mask), labels)


def test_without_the_network_it_is_one_line(tmp_path, checkpoint, assets):
    plan = plan_of(checkpoint)
    with pytest.raises(InputError, match="slice_policy is nnunet.* is not there; set nnunet_encoder_checkpoint"):
        open_cache(configuration(tmp_path, tmp_path / "gone.pth"), plan)
    kind = "3d_plain" if plan.dim == 2 else "2d_plain"
    other = assets / "nnunet_tiny" / kind / "fold_0" / "checkpoint_best.pth"
    with pytest.raises(InputError, match="another plan than the model was trained with"):
        open_cache(configuration(tmp_path, other), plan)
    unused = configuration(tmp_path, tmp_path / "gone.pth", slice_policy="mask")
    assert isinstance(open_cache(unused, plan), VolumeCache)


def test_auto_segments_and_takes_masks_only_where_there_is_no_decoder(tmp_path, checkpoint, capsys):
    plan = plan_of(checkpoint)
    assert isinstance(open_cache(configuration(tmp_path, checkpoint, slice_policy="auto"), plan), SegmentedCache)
    content = torch.load(checkpoint, weights_only=False)
    weights = content["network_weights"]
    content["network_weights"] = {name: w for name, w in weights.items() if not name.startswith("decoder.")}
    torch.save(content, tmp_path / "encoder.pth")
    assert isinstance(
        open_cache(configuration(tmp_path, tmp_path / "encoder.pth", slice_policy="auto"), plan), VolumeCache
    )
    assert "has no decoder: slices follow the masks" in capsys.readouterr().out
    with pytest.raises(InputError, match="no decoder to segment with; set slice_policy: auto"):
        open_cache(configuration(tmp_path, tmp_path / "encoder.pth"), plan)


def test_lesions_are_measured_on_the_scan_and_compared_with_its_mask(tmp_path, checkpoint, scan):
    cache = open_cache(configuration(tmp_path, checkpoint), plan_of(checkpoint))
    write_volume(
        tmp_path / "mask.nii.gz", (np.arange(16) == 9)[:, None, None] * np.ones((16, 60, 66), np.uint8), (3, 1.2, 1.2)
    )
    volume = cache.get(scan, tmp_path / "mask.nii.gz")
    assert volume.lesions_from == "segmentation" and volume.compared.dice > 0
    assert sum(finding.count for finding in volume.findings) >= len(volume.findings) > 0
    largest = max(volume.findings, key=lambda finding: finding.measured.volume_mm3)
    assert largest.source == "segmentation" and largest.side is None, "no lungs in this scan"
    # The labels were moved from the plan's grid to the scan's, voxel by voxel.
    total = sum(finding.measured.volume_mm3 for finding in volume.findings)
    assert total == pytest.approx(np.count_nonzero(volume.mask) * np.prod(volume.spacing), rel=0.15)
    assert -1000 <= largest.measured.mean_hu <= 600 and 0 < largest.size_mm < 110


def test_specks_are_dropped_from_the_views(tmp_path, checkpoint, scan):
    plan = plan_of(checkpoint)
    volume = open_cache(configuration(tmp_path, checkpoint), plan).get(scan)
    select = [ViewSelection(plan, (8,) * plan.dim, 1, "auto", min_lesion_mm3=least) for least in (0.0, 1e9)]
    assert select[0].lesions(volume) and not select[1].lesions(volume)
    assert not select[1].select(volume).roi.any()


def test_segmenting_leaves_the_global_generator_alone(tmp_path, checkpoint, scan):
    """Or a run that segments its scans would start from other weights than one that finds them segmented."""
    cache = open_cache(configuration(tmp_path, checkpoint), plan_of(checkpoint))
    before = torch.get_rng_state()
    assert cache.ensure(scan)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_that_knows_the_training_cases_is_told():
    def cases(*dice: float) -> list[ComparedCase]:
        return [ComparedCase(value, (), ((100.0, 100.0),)) for value in dice]

    new = cases(0.7, 0.8, 0.9, 0.8)
    assert "Dice 0.96 on the training cases: this nnU-Net knows them" in describe_segmentation(
        new, 0, cases(0.95, 0.96, 0.97)
    )
    for training in (cases(0.8, 0.9, 0.7), cases(0.99), []):
        assert "knows" not in describe_segmentation(new, 0, training)
    assert "knows" not in describe_segmentation(cases(0.8), 0, cases(0.95, 0.96, 0.97)), "one case proves nothing"


def test_a_fold_of_another_plan_segments_nothing(tmp_path, assets, checkpoint, scan):
    kind = "3d_plain" if plan_of(checkpoint).dim == 2 else "2d_plain"
    other, own = (tmp_path / "nnunet" / fold / checkpoint.name for fold in ("fold_1", "fold_0"))
    (other.parent / "validation").mkdir(parents=True)
    own.parent.mkdir()
    shutil.copy(assets / "nnunet_tiny" / kind / "fold_0" / "checkpoint_best.pth", other)
    shutil.copy(checkpoint, own)
    shutil.copy(scan, other.parent / "validation" / scan.name)
    cache = open_cache(configuration(tmp_path, own), plan_of(checkpoint))
    with pytest.raises(InputError, match="fold_1.*has another plan than the nnU-Net whose cases it held out"):
        cache.get(scan)


def test_a_case_is_segmented_by_the_fold_that_held_it_out(tmp_path, checkpoint, scan, monkeypatch):
    """Five folds as nnU-Net leaves them; ``fold_all`` predicts its own training cases."""
    folds = {name: tmp_path / "nnunet" / name / "checkpoint_final.pth" for name in ("fold_0", "fold_1", "fold_all")}
    content = torch.load(checkpoint, weights_only=False)
    for number, (name, file) in enumerate(folds.items()):
        (file.parent / "validation").mkdir(parents=True)
        shutil.copy(scan, file.parent / "validation" / f"{name}_case.1.nii.gz")
        (file.parent / "validation" / "summary.json").write_text("{}", encoding="utf-8")
        torch.save(content | {"current_epoch": number}, file)
    images = {name: tmp_path / f"{name}_case.1_0000.nii.gz" for name in (*folds, "new")}
    for image in images.values():
        shutil.copy(scan, image)
    cache = open_cache(configuration(tmp_path, folds["fold_0"]), plan_of(checkpoint))
    by = {name: cache.network_of(image).parent.name for name, image in images.items()}
    assert by == {"fold_0": "fold_0", "fold_1": "fold_1", "fold_all": "fold_0", "new": "fold_0"}
    assert cache.network_of(Path("fold_1_case.1.mha")) == folds["fold_1"], "other names and formats of the same case"
    assert cache.entry(images["fold_1"]) != cache.entry(images["fold_0"]) == cache.entry(images["new"])
    used, labels_of = [], segmentation.segment

    def noted(network: segmentation.Network, *rest: object) -> np.ndarray:
        used.append(network.unet)
        return labels_of(network, *rest)

    monkeypatch.setattr(segmentation, "segment", noted)
    assert segment_all(cache, [(image, None) for image in images.values()]) == 2
    assert len(used) == 2 and used[0] is not used[1]


def test_a_worker_of_a_loader_leaves_the_gpu_to_its_parent(checkpoint, monkeypatch):
    """It meets a damaged entry: in a forked process CUDA cannot start, a spawned one would keep a second context."""
    monkeypatch.setattr(segmentation, "best_device", lambda: "meta")
    assert segmentation._network(checkpoint, plan_of(checkpoint)).device.type == "meta"
    segmentation._network.cache_clear()
    monkeypatch.setattr(segmentation, "get_worker_info", lambda: "worker 1 of 2")
    assert segmentation._network(checkpoint, plan_of(checkpoint)).device.type == "cpu"
    segmentation._network.cache_clear()
