"""From a volume to what the encoder sees, and from samples to a batch."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from config.errors import InputError
from config.plans import Intensity, PreprocessPlan, Resampling
from config.schema import build_config
from data.cache import CachedVolume
from data.medical_vlm_dataset import (
    CaptionCollator,
    Framing,
    MedicalVLMDataset,
    Sample,
    centred,
    choose_slices,
    encode_answer,
    encode_prompt,
    shifted,
)
from data.nifti import write_volume

PLAN_2D = PreprocessPlan(
    configuration="2d",
    dim=2,
    spacing=(1.0, 1.0),
    patch_size=(16, 24),
    transpose_forward=(0, 1, 2),
    normalization_schemes=("CTNormalization",),
    use_mask_for_norm=(False,),
    intensity=(Intensity(mean=-300.0, std=400.0, percentile_00_5=-1000.0, percentile_99_5=600.0),),
    image_reader_writer="SimpleITKIO",
    orientation="LPS",
    data_resampling=Resampling(order=3),
    mask_resampling=Resampling(order=1),
)
PLAN_3D = replace(PLAN_2D, configuration="3d_fullres", dim=3, spacing=(2.0, 1.0, 1.0), patch_size=(8, 16, 16))
END = 256


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """256 byte tokens and an end."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocabulary, "<|endoftext|>": END}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


class InMemory:
    """Has what a stored array has."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape

    def planes(self, first: int, last: int) -> np.ndarray:
        return self.array[..., first:last, :, :]

    def plane(self, index: int) -> np.ndarray:
        return self.array[..., index, :, :]

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return self.array


def cached(shape: tuple[int, int, int], lesion: tuple[slice, slice, slice] | None = None) -> CachedVolume:
    """Voxels that tell where they were: z·10⁴ + y·10² + x, and 1 more, so that padding's zero is none of them."""
    z, y, x = np.indices(shape)
    image = (1 + z * 10_000 + y * 100 + x).astype(np.float32)[None]
    mask = None
    if lesion is not None:
        mask = np.zeros(shape, np.uint8)
        mask[lesion] = 1
    lesion_voxels = None if mask is None else np.count_nonzero(mask, axis=(1, 2))
    stored = None if mask is None else InMemory(mask)
    return CachedVolume(InMemory(image), stored, lesion_voxels, (1.0, 1.0, 1.0), None)


def depths(planes: torch.Tensor) -> list[int]:
    """z of every plane (K, 1, H, W), read from its largest voxel."""
    return [int((plane.max() - 1) // 10_000) for plane in planes]


# ---------------------------------------------------------------- which slices


@settings(deadline=None, max_examples=200)
@given(
    lesion=st.one_of(st.none(), st.lists(st.integers(0, 5), min_size=1, max_size=30)),
    depth=st.integers(1, 30),
    count=st.integers(1, 12),
)
def test_choose_slices_always(lesion, depth, count):
    voxels = None if lesion is None else np.array(lesion)
    depth = depth if voxels is None else len(voxels)
    chosen = choose_slices(voxels, depth, count)
    assert len(chosen) == count
    assert chosen == sorted(chosen)
    assert chosen[0] >= 0 and chosen[-1] < depth
    assert len(set(chosen)) == min(count, depth), "no slice twice while there are others"
    if voxels is not None and voxels.any():
        assert int(voxels.argmax()) in chosen
        # No slice is preferred to one with more lesion.
        assert sum(voxels[sorted(set(chosen))]) == sum(np.sort(voxels)[::-1][: min(count, depth)])


@pytest.mark.parametrize(
    ("lesion", "depth", "count", "expected"),
    [
        (None, 9, 1, [4]),
        (None, 9, 3, [3, 4, 5]),
        (None, 10, 2, [4, 5]),
        ([0] * 9, 9, 3, [3, 4, 5]),
        ([0, 0, 0, 0, 0, 0, 0, 7, 9], 9, 1, [8]),
        ([0, 0, 0, 0, 0, 0, 0, 7, 9], 9, 2, [7, 8]),
        ([0, 9, 0, 0, 0, 0, 0, 7, 0], 9, 3, [0, 1, 7]),
        ([0, 9, 0, 0, 0, 0, 0, 7, 0], 9, 2, [1, 7]),
        ([3, 3, 3], 3, 2, [0, 1]),
        (None, 2, 4, [0, 1, 1, 1]),
        (None, 1, 1, [0]),
    ],
)
def test_choose_slices_cases(lesion, depth, count, expected):
    assert choose_slices(None if lesion is None else np.array(lesion), depth, count) == expected


# ---------------------------------------------------------------- framing


@settings(deadline=None, max_examples=50)
@given(extent=st.tuples(st.integers(1, 9), st.integers(1, 9)), size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_centred_pads_both_sides_alike_and_cuts_nothing(extent, size):
    plane = np.arange(1, 1 + 2 * extent[0] * extent[1]).reshape(2, *extent)
    padded = centred(plane, size)
    assert padded.shape == (2, *(max(pair) for pair in zip(extent, size, strict=True)))
    assert padded.dtype == np.float32
    before = [max(s - e, 0) // 2 for e, s in zip(extent, size, strict=True)]
    inner = padded[:, before[0] : before[0] + extent[0], before[1] : before[1] + extent[1]]
    assert np.array_equal(inner, plane)
    assert padded.sum() == plane.sum(), "the rest is zero"


@pytest.mark.parametrize(
    ("extent", "expected"),
    [((10, 11), (16, 24)), ((16, 24), (16, 24)), ((17, 20), (24, 24)), ((33, 25), (40, 32)), ((40, 32), (40, 32))],
)
def test_slice_has_the_patch_size_or_the_next_multiple_of_the_stride(extent, expected):
    images, _ = Framing(PLAN_2D, (8, 8), slices=2, policy="middle")(cached((5, *extent)))
    assert images.shape == (2, 1, *expected) and images.dtype == torch.float32
    assert int((images[0] != 0).sum()) == extent[0] * extent[1], "the whole slice is seen"


def test_policy_mask_takes_the_lesion_and_middle_does_not():
    volume = cached((20, 8, 8), lesion=(slice(15, 17), slice(0, 3), slice(0, 3)))
    assert depths(Framing(PLAN_2D, (8, 8), 2, "mask")(volume)[0]) == [15, 16]
    assert depths(Framing(PLAN_2D, (8, 8), 2, "middle")(volume)[0]) == [9, 10]
    assert depths(Framing(PLAN_2D, (8, 8), 2, "mask")(cached((20, 8, 8)))[0]) == [9, 10]


@settings(deadline=None, max_examples=50)
@given(
    depth=st.integers(1, 20), slices=st.integers(1, 8), plan=st.sampled_from([PLAN_2D, PLAN_3D]), z=st.integers(0, 19)
)
def test_slice_position_lies_in_0_to_1_and_rises_with_z(depth, slices, plan, z):
    at = min(z, depth - 1)
    volume = cached((depth, 8, 8), lesion=(slice(at, at + 1), slice(0, 2), slice(0, 2)))
    images, position = Framing(plan, (4,) * plan.dim, slices, "mask")(volume)
    assert position.shape == (slices,) and position.dtype == torch.float32
    assert position.min() >= 0 and position.max() <= 1
    assert (position.diff() >= 0).all()
    if plan is PLAN_2D:
        assert torch.allclose(position, (torch.tensor(depths(images)) + 0.5) / depth)


def test_writing_to_a_sample_does_not_reach_the_cache():
    volume = cached((8, 16, 16))
    volume.image.array.flags.writeable = False
    for plan in (PLAN_2D, PLAN_3D):
        images, _ = Framing(plan, (8,) * plan.dim, 1, "middle")(volume)
        images += 1


def test_patch_is_centred_on_the_lesion():
    volume = cached((30, 40, 50), lesion=(slice(10, 14), slice(20, 24), slice(30, 34)))
    images, position = Framing(PLAN_3D, (4, 8, 8), slices=2, policy="mask")(volume)
    assert images.shape == (1, 8, 16, 16)
    assert np.array_equal(images[0], volume.image.array[0, 8:16, 14:30, 24:40])
    # Two planes stand for the patch's lower and upper half.
    assert torch.allclose(position, torch.tensor([10.0, 14.0]) / 30)


def test_patch_without_a_lesion_or_by_policy_is_the_middle():
    lesion = (slice(0, 2), slice(0, 2), slice(0, 2))
    for volume, policy in ((cached((30, 40, 50)), "mask"), (cached((30, 40, 50), lesion), "middle")):
        images, position = Framing(PLAN_3D, (4, 8, 8), slices=1, policy=policy)(volume)
        assert np.array_equal(images[0], volume.image.array[0, 11:19, 12:28, 17:33])
        assert position.item() == pytest.approx(0.5)


@pytest.mark.parametrize(("corner", "expected"), [((0, 0, 0), (0, 0, 0)), ((29, 39, 49), (22, 24, 34))])
def test_patch_is_clamped_to_the_volume(corner, expected):
    volume = cached((30, 40, 50), lesion=tuple(slice(c, c + 1) for c in corner))
    images, _ = Framing(PLAN_3D, (4, 8, 8), slices=1, policy="mask")(volume)
    window = tuple(slice(start, start + size) for start, size in zip(expected, PLAN_3D.patch_size, strict=True))
    assert np.array_equal(images[0], volume.image.array[0][window])


def test_volume_smaller_than_the_patch_is_padded_and_its_planes_keep_their_place():
    volume = cached((4, 10, 40))
    images, position = Framing(PLAN_3D, (4, 8, 8), slices=4, policy="middle")(volume)
    assert images.shape == (1, 8, 16, 16)
    assert np.array_equal(images[0, 2:6, 3:13], volume.image.array[0, :, :, 12:28])
    assert (images[0, :2] == 0).all() and (images[0, :, :3] == 0).all()
    # Patch planes 0-2, 2-4, 4-6, 6-8; the volume fills planes 2 to 6.
    assert torch.allclose(position, torch.tensor([0.0, 0.25, 0.75, 1.0]))


# ---------------------------------------------------------------- text


def test_prompt_is_cut_and_ends_with_a_line_break(tokenizer):
    [newline] = tokenizer.encode("\n")
    assert encode_prompt(tokenizer, "abc", 128) == [*tokenizer.encode("abc"), newline]
    assert encode_prompt(tokenizer, "abc" * 100, 5) == [*tokenizer.encode("abcab"), newline]
    assert encode_prompt(tokenizer, "", 128) == [newline]


def test_answer_ends_with_end_of_text_unless_it_is_cut(tokenizer):
    assert encode_answer(tokenizer, "abc", 4) == ([*tokenizer.encode("abc"), END], False)
    assert encode_answer(tokenizer, "abc", 3) == ([*tokenizer.encode("abc"), END], False)
    ids, cut = encode_answer(tokenizer, "abc", 2)
    assert cut and ids == tokenizer.encode("ab") and END not in ids


def sample(shape: tuple[int, ...], question: str, answer: str, row: int) -> Sample:
    return Sample(torch.full(shape, float(row)), torch.tensor([0.25, 0.75]), question, answer, row)


def test_collator_stacks_equal_sizes_and_lists_different_ones(tokenizer):
    collator = CaptionCollator(tokenizer, 128, 1024)
    same = collator([sample((2, 1, 8, 8), "", "a", row) for row in (3, 5)])
    assert same["images"].shape == (2, 2, 1, 8, 8)
    assert same["row"].tolist() == [3, 5] and same["slice_position"].tolist() == [[0.25, 0.75]] * 2
    mixed = collator([sample((2, 1, 8, 8), "", "a", 0), sample((2, 1, 8, 16), "", "a", 1)])
    assert [tuple(image.shape) for image in mixed["images"]] == [(2, 1, 8, 8), (2, 1, 8, 16)]
    assert mixed["slice_position"].shape == (2, 2)


def test_collator_pads_on_the_right_and_masks_the_padding(tokenizer):
    samples = [sample((1, 1, 4, 4), "Why?", "结节", 0), sample((1, 1, 4, 4), "", "Normal lungs.", 1)]
    batch = CaptionCollator(tokenizer, 128, 1024)(samples)
    for name, texts in (
        ("question", ["Why?\n", "\n"]),
        ("answer", ["结节<|endoftext|>", "Normal lungs.<|endoftext|>"]),
    ):
        ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"]
        assert ids.shape == mask.shape and ids.dtype == torch.long
        assert (mask.diff(dim=1) <= 0).all(), "ones, then zeros"
        assert (ids[mask == 0] == 0).all()
        assert [tokenizer.decode(row[keep.bool()]) for row, keep in zip(ids, mask, strict=True)] == texts
        assert mask.sum(1).max() == mask.shape[1], "no longer than the longest"


def test_collator_without_a_tokenizer_gives_images_alone():
    batch = CaptionCollator(None, 128, 1024)([sample((1, 1, 4, 4), "Why?", "a", 0)])
    assert set(batch) == {"images", "slice_position", "row"}


# ---------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases of two sizes, one with a lesion mask, and a table; no prompt file."""
    folder = tmp_path_factory.mktemp("cases")
    rng = np.random.default_rng(0)
    rows = ["image_path,question,answer,mask_path"]
    for case, size in enumerate([(6, 12, 14), (6, 12, 14), (7, 20, 30)]):
        write_volume(folder / f"{case}.nii.gz", rng.integers(-1000, 500, size).astype(np.int16), (5.0, 1.0, 1.0))
        rows.append(f"{case}.nii.gz,{'What?' if case == 0 else ''},Report {case}.,{'m.nii.gz' if case == 1 else ''}")
    mask = np.zeros((6, 12, 14), np.uint8)
    mask[5, 3:6, 3:6] = 1
    write_volume(folder / "m.nii.gz", mask, (5.0, 1.0, 1.0))
    (folder / "prompts.json").write_text('{"caption_prompt": ["Describe it."]}', encoding="utf-8")
    (folder / "train.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder / "train.csv"


def dataset(table: Path, **keys: object) -> MedicalVLMDataset:
    values = {"cache_dir": str(table.parent / "cache"), "caption_prompt_json": str(table.parent / "prompts.json")}
    return MedicalVLMDataset.from_config(build_config({**values, **keys}, "test"), table, PLAN_2D, (8, 8), seed=0)


def test_samples_carry_their_row(table):
    cases = dataset(table, slices=2)
    assert len(cases) == 3
    samples = [cases[index] for index in range(3)]
    assert [s.row for s in samples] == [0, 1, 2]
    assert [s.question for s in samples] == ["What?", "Describe it.", "Describe it."]
    assert [s.answer for s in samples] == ["Report 0.", "Report 1.", "Report 2."]
    assert [tuple(s.images.shape) for s in samples] == [(2, 1, 16, 24), (2, 1, 16, 24), (2, 1, 24, 32)]
    assert samples[1].slice_position[-1].item() == pytest.approx(5.5 / 6), "the lesion's slice"


def test_a_row_without_question_needs_prompts_before_any_image_is_read(table):
    with pytest.raises(InputError, match="row 3 .*has no question"):
        dataset(table, caption_prompt_json=None)


def test_spawned_worker_gives_what_the_main_process_gives(table, tokenizer):
    """As on Windows: data set and collator travel by pickle, and nothing is inherited."""
    cases, collator = dataset(table), CaptionCollator(tokenizer, 128, 1024)
    here = list(DataLoader(pickle.loads(pickle.dumps(cases)), batch_size=2, collate_fn=collator))
    there = list(DataLoader(cases, 2, collate_fn=collator, num_workers=1, multiprocessing_context="spawn"))
    assert len(here) == len(there) == 2
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=0, atol=0)


def test_shifted_moves_and_fills_with_zero():
    plane = np.arange(12, dtype=np.float32).reshape(1, 3, 4) + 1
    moved = shifted(plane, (1, -2))
    assert np.array_equal(moved[0, 1:, :2], plane[0, :2, 2:])
    assert not moved[0, 0].any() and not moved[0, :, 2:].any()
    assert shifted(plane, (0, 0)) is plane
    assert not shifted(plane, (3, 0)).any()


@pytest.mark.parametrize(("megabytes", "reads"), [(0, 6), (64, 3)])
def test_images_once_read_stay_in_memory_as_far_as_there_is_room(table, monkeypatch, megabytes, reads):
    cases = dataset(table, memory_cache_mb=megabytes)
    first = [cases[index].images.clone() for index in range(3)]
    count = []
    get = cases.cache.get
    monkeypatch.setattr(cases.cache, "get", lambda *args: (count.append(1), get(*args))[1])
    for _ in range(2):
        samples = [cases[index].images for index in range(3)]
        for sample, expected in zip(samples, first, strict=True):
            assert torch.equal(sample, expected)
            sample += 1  # whoever writes to a sample does not write to what is kept
    assert len(count) == reads - (3 if megabytes else 0)
