"""The model family, and what the benchmark compares it with."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from tools.bench.family import ROWS, Family, FamilyOptions, list_orders, measure_family
from tools.bench.models import read_tensors, write_safetensors
from tools.bench.setting import Setting
from tools.bench.workplace import BenchError
from tools.bench.xor_delta import XorStore, join_planes, split_planes
from tools.family_weights import (
    EMBEDDINGS,
    LINEAR,
    Recipe,
    grow,
    make_base,
    merge_linear,
    merge_slerp,
    merge_ties,
    pretend_to_train,
    quantize_int8,
    top_layers,
)
from tools.make_family import (
    MANIFEST,
    NEW_TOKENS,
    SHARD_COUNT,
    FamilyError,
    main,
    make_family,
    read_family,
)

ROOT = Path(__file__).parents[2]
HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    place = tmp_path_factory.mktemp("family") / "family"
    return Family(place, make_family(place, synthetic=True, scale=0.05))


def load(family, name):
    tensors = {}
    for path in sorted((family.place / name).glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def member(family, name):
    return next(member for member in family.members if member.name == name)


def f32(tensors):
    return {n: t.astype(np.float32) for n, t in tensors.items() if t.dtype != np.int64}


def base_weights(scale=0.05):
    return f32(make_base(scale))


# --- what is on disk


def test_every_member_loads_and_has_the_dtype_it_says(family):
    names = {"F32": "F32", "BF16": "BF16", "F16": "F16", "F8_E4M3": "F8_E4M3", "I8": "I8"}
    for one in family.members:
        for path in (family.place / one.name).glob("*.safetensors"):
            with safe_open(path, "np") as file:
                assert file.metadata() == {"format": "pt"}
                assert all(file.get_slice(name).get_shape() for name in file.keys())  # noqa: SIM118
        tensors = [
            tensor
            for path in (family.place / one.name).glob("*.safetensors")
            for tensor in read_tensors(path)
        ]
        sizes = {}
        for tensor in tensors:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + len(tensor.raw)
        assert max(sizes, key=sizes.get) == names[one.dtype], one.name
        assert (family.place / one.name / "config.json").is_file()


def test_the_manifest_lists_what_is_there_with_parents_before_children(family):
    assert read_family(family.place) == family.members
    directories = {path.name for path in family.place.iterdir() if path.is_dir()}
    assert directories == {one.name for one in family.members}
    assert not list(family.place.glob(".*"))
    seen = set()
    for one in family.members:
        assert set(one.parents) <= seen, one.name
        assert bool(one.parents) == (one.kind != "base")
        seen.add(one.name)


def test_every_member_but_the_base_has_a_row_of_its_own(family):
    for one in family.members:
        rows = [row.key for row in ROWS if row.has(one)]
        assert len(rows) == (one.kind != "base"), one.name
    assert all(any(row.has(one) for one in family.members) for row in ROWS)


def test_copies_are_casts(family):
    base = load(family, "base-f32")
    for name, dtype in (("base-bf16", ml_dtypes.bfloat16), ("base-f16", np.float16)):
        copy = load(family, name)
        assert all((copy[n] == t.astype(dtype)).all() for n, t in f32(base).items())
    run, half = load(family, "run-200-f32"), load(family, "run-200-bf16")
    assert all((half[n] == t.astype(ml_dtypes.bfloat16)).all() for n, t in f32(run).items())
    # safetensors for numpy cannot load this dtype.
    stored = {t.name: t for t in read_tensors(family.place / "base-fp8" / "model.safetensors")}
    expected = base[EMBEDDINGS].astype(ml_dtypes.float8_e4m3fn).tobytes()
    assert bytes(stored[EMBEDDINGS].raw) == expected


def test_fine_tunes_move_weights_more_the_stronger_they_are(family):
    base = f32(load(family, "base-bf16"))
    shares = []
    for name in ("gentle", "usual", "strong"):
        tuned = f32(load(family, f"{name}-bf16"))
        changed = [np.count_nonzero(tuned[n] != base[n]) for n in base]
        shares.append(sum(changed) / sum(t.size for t in base.values()))
    assert 0 < shares[0] < shares[1] < shares[2] < 1


def test_merges_of_stored_models_are_those_merges(family):
    usual, strong = f32(load(family, "usual-bf16")), f32(load(family, "strong-bf16"))
    other, base = f32(load(family, "strong-b-bf16")), f32(load(family, "base-bf16"))
    for name, expected in (
        ("slerp-bf16", merge_slerp(usual, strong, 0.4)),
        ("ties-bf16", merge_ties(base, [usual, other])),
    ):
        merged = load(family, name)
        assert all((merged[n] == t.astype(ml_dtypes.bfloat16)).all() for n, t in expected.items())
    # The mean is of the f32 weights, which are not stored: it is near that of the stored ones.
    merged = f32(load(family, "linear-bf16"))
    for name, mean in merge_linear(strong, other).items():
        step = np.abs(mean) * 2.0**-7 + np.abs(strong[name] - other[name]) + 1e-6
        assert (np.abs(merged[name] - mean) <= step).all()


def test_only_the_chosen_layers_moved(family):
    base = load(family, "base-bf16")
    for name, pattern in (("top-bf16", r"encoder.*"), ("qv-bf16", r".*(query|value).*")):
        tuned = load(family, name)
        moved = {n for n in base if (tuned[n] != base[n]).any()}
        assert moved
        assert all(re.fullmatch(pattern, n) for n in moved)


def test_a_copy_with_other_names_or_shards_has_the_same_weights(family):
    usual, renamed = load(family, "usual-bf16"), load(family, "renamed-bf16")
    assert not usual.keys() & renamed.keys()
    assert sorted(t.tobytes() for t in usual.values()) == sorted(
        t.tobytes() for t in renamed.values()
    )
    strong, place = load(family, "strong-bf16"), family.place / "sharded-bf16"
    index = json.loads((place / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == strong.keys()
    assert 1 < len(set(index["weight_map"].values())) <= SHARD_COUNT
    for name, file in index["weight_map"].items():
        assert load_file(place / file)[name].tobytes() == strong[name].tobytes()


def test_a_grown_vocabulary_keeps_its_old_rows_in_place(family):
    base, grown = load(family, "base-bf16")[EMBEDDINGS], load(family, "grown-bf16")[EMBEDDINGS]
    assert grown.shape == (len(base) + NEW_TOKENS, base.shape[1])
    assert 0.5 < np.mean(grown[: len(base)] == base) < 1
    config = json.loads((family.place / "grown-bf16" / "config.json").read_text())
    assert config["vocab_size"] == len(grown)


def test_int8_times_its_scale_is_near_what_was_quantized(family):
    usual, quantized = f32(load(family, "usual-bf16")), load(family, "usual-int8")
    for name, tensor in usual.items():
        if tensor.ndim == 2:
            scale = quantized[f"{name}_scale"]
            assert scale.shape == (len(tensor), 1)
            error = np.abs(quantized[name].astype(np.float32) * scale - tensor)
            assert (error <= scale * 0.501).all()
            assert (np.abs(quantized[name]).max(axis=1) == 127).all()


def test_a_family_is_the_same_every_time(family, tmp_path):
    make_family(tmp_path / "again", synthetic=True, scale=0.05)
    for one in family.members:
        for path in (family.place / one.name).rglob("*"):
            other = tmp_path / "again" / path.relative_to(family.place)
            assert path.is_dir() or path.read_bytes() == other.read_bytes()


def test_a_directory_with_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    assert main([str(tmp_path), "--synthetic", "--scale", "0.05"]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_directory_without_a_manifest_is_no_family(tmp_path):
    with pytest.raises(FamilyError, match=MANIFEST):
        read_family(tmp_path)


# --- how weights change


def test_made_up_adapters_have_the_rank_asked_for():
    base = base_weights()
    recipe = Recipe(10, 1e-2, seed=3, lora_rank=2)
    tuned = pretend_to_train(base, recipe)[10]
    for name, tensor in tuned.items():
        change = tensor.astype(np.float64) - base[name]
        if LINEAR.fullmatch(name):
            assert np.linalg.matrix_rank(change, tol=1e-4) == 2
        else:
            assert not change.any()


def test_made_up_training_moves_all_of_a_matrix_but_few_embeddings():
    base = base_weights(0.1)
    tuned = pretend_to_train(base, Recipe(100, 1e-3, seed=3))[100]
    name = next(name for name in base if LINEAR.fullmatch(name))
    moved = np.abs(tuned[name] - base[name])
    small = np.abs(base[name]) < np.median(np.abs(base[name]))
    assert 0.8 < moved[small].mean() / moved[~small].mean() < 1.25  # as Adam: whatever their size
    rows = np.abs(tuned[EMBEDDINGS] - base[EMBEDDINGS]).max(axis=1) > 2e-3
    assert 0.01 < rows.mean() < 0.15


def test_checkpoints_lie_on_one_way():
    base = base_weights()
    kept = pretend_to_train(base, Recipe(300, 1e-4, seed=3), (100, 200))
    assert sorted(kept) == [100, 200, 300]
    name = "encoder.layer.0.attention.self.query.weight"
    first, later = (np.linalg.norm(kept[step][name] - base[name]) for step in (100, 300))
    assert first < np.linalg.norm(kept[200][name] - base[name]) < later


def test_ties_keeps_the_largest_changes_that_agree():
    base = {"w": np.zeros(4, np.float32)}
    one = {"w": np.array([4.0, -3.0, 0.1, 2.0], np.float32)}
    two = {"w": np.array([2.0, 5.0, 0.1, 0.2], np.float32)}
    # Kept: 4 and -3 of one, 2 and 5 of the other; 5 outweighs -3.
    assert merge_ties(base, [one, two], 0.5)["w"].tolist() == [3.0, 5.0, 0.0, 0.0]


def test_slerp_keeps_the_length_that_a_mean_loses():
    one = {"w": np.array([1.0, 0.0], np.float32)}
    two = {"w": np.array([0.0, 1.0], np.float32)}
    assert np.linalg.norm(merge_slerp(one, two)["w"]) == pytest.approx(1)
    assert np.linalg.norm(merge_linear(one, two)["w"]) == pytest.approx(0.5**0.5)
    assert merge_slerp(one, one)["w"].tolist() == [1.0, 0.0]


def test_a_row_of_zeros_can_be_quantized():
    quantized = quantize_int8({"w": np.zeros((2, 3), np.float32)})
    assert not quantized["w"].any()
    assert (quantized["w_scale"] == 1).all()


def test_new_rows_are_near_the_mean():
    base = base_weights()
    grown = grow(base, 5)[EMBEDDINGS]
    spread = base[EMBEDDINGS].std(axis=0)
    assert (np.abs(grown[-5:] - base[EMBEDDINGS].mean(axis=0)) < 0.1 * spread).all()


def test_the_top_layers_are_the_last_ones():
    names = [f"encoder.layer.{number}.output.dense.bias" for number in range(12)]
    pattern = re.compile(top_layers(names, 2))
    assert [n for n in names if pattern.fullmatch(n)] == names[-2:]
    assert pattern.fullmatch("pooler.dense.weight")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_training_with_torch_moves_what_it_may_and_repeats():
    # In a process of its own: torch sets up threads, and warns while it is imported.
    code = """
import numpy as np
from tools.family_weights import Recipe, make_base, top_layers
from tools.train_minilm import train
base = {n: a for n, a in make_base(1 / 4).items() if a.dtype == np.float32}
corpus = np.random.default_rng(1).integers(1000, 3000, 5000)
recipe = Recipe(2, 1e-3, seed=5, trains=top_layers(base, 1))
one, two = (train(corpus, base, recipe, (1,)) for _ in range(2))
assert sorted(one) == [1, 2]
moved = {n for n in base if (one[2][n] != base[n]).any()}
assert moved and all(n.startswith("encoder.layer.1.") for n in moved), moved
assert all((one[2][n] == two[2][n]).all() for n in base)
lora = train(corpus, base, Recipe(2, 1e-2, seed=5, lora_rank=2))[2]
name = "encoder.layer.1.attention.self.query.weight"
assert np.linalg.matrix_rank(lora[name].astype(float) - base[name], tol=1e-5) == 2
"""
    words = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- the XOR baseline


def test_planes_come_back():
    rng = np.random.default_rng(1)
    # Small planes of few values: some shrink, some grow, some are as large compressed.
    for item_bytes, size in ((1, 4096), (8, 0), *((1 << n % 4, 8 * n) for n in range(1, 40))):
        raw = rng.integers(0, 1 + size % 3, size, np.uint8)
        planes = split_planes(raw, item_bytes)
        assert join_planes(planes, item_bytes, size).tobytes() == raw.tobytes()


def test_what_the_baseline_stores_decodes_to_what_it_was_given(family):
    store = XorStore(keep=True)
    added = []
    for one in family.members:
        for path in sorted((family.place / one.name).glob("*.safetensors")):
            added += [(store.add(tensor)[0], tensor) for tensor in read_tensors(path)]
    assert all(store.decode(number) == bytes(tensor.raw) for number, tensor in added)


def tensor_file(path, arrays):
    specs = [(f"t{i}", "F32", array.shape, array.nbytes) for i, array in enumerate(arrays)]
    return read_tensors(write_safetensors(path, specs, [array.tobytes() for array in arrays]))


def test_the_baseline_finds_the_closest_tensor_whatever_its_name(tmp_path):
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((200, 100), np.float32) for _ in range(4)]
    near = arrays[2] * np.float32(1.00001)
    store = XorStore(keep=True)
    *_, last, copy = (store.add(t) for t in tensor_file(tmp_path / "t", [*arrays, near, near]))
    assert store._stored[last[0]].source == 2
    assert last[1] < 0.7 * near.nbytes
    assert copy == (last[0], 0)


def test_the_baseline_is_never_worse_than_planes_alone(tmp_path):
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((200, 100), np.float32) for _ in range(2)]
    sizes = [XorStore().add(tensor)[1] for tensor in tensor_file(tmp_path / "t", arrays)]
    store = XorStore()
    together = [store.add(tensor)[1] for tensor in tensor_file(tmp_path / "t", arrays)]
    assert together[0] == sizes[0]
    assert together[1] <= sizes[1]


def test_referring_to_a_model_is_as_good_as_storing_it(family):
    first, second = (family.place / name for name in ("base-bf16", "usual-bf16"))
    stored, referred = XorStore(), XorStore()
    stored.add_directory(first)
    referred.refer_to(first)
    assert stored.add_directory(second) == referred.add_directory(second) > 0
    assert referred.add_directory(first) == 0


# --- the section


def test_ancestors_are_all_that_a_member_comes_from(family):
    names = [one.name for one in family.ancestors(member(family, "linear-bf16"))]
    assert names == ["base-f32", "base-bf16", "strong-bf16", "strong-b-bf16"]
    assert family.ancestors(member(family, "base-f32")) == []


def test_orders_are_permutations_that_do_not_change(family):
    orders = list_orders(family.members, 7)
    assert len(orders) == 7
    assert all(set(order) == set(family.members) for order in orders)
    assert orders == list_orders(family.members[::-1], 7)
    assert orders[0] == orders[1][::-1]
    assert len({tuple(one.name for one in order) for order in orders}) == 7
    assert list_orders(family.members, 0) == []


@pytest.mark.slow
def test_a_small_family_is_measured_by_the_real_command(family, tmp_path):
    chosen = ("base-f32", "base-bf16", "usual-bf16", "renamed-bf16")
    place = tmp_path / "small"
    for name in chosen:
        shutil.copytree(family.place / name, place / name)
    manifest = json.loads((family.place / MANIFEST).read_text())
    manifest["members"] = [m for m in manifest["members"] if m["name"] in chosen]
    (place / MANIFEST).write_text(json.dumps(manifest))
    options = FamilyOptions(place, order_count=1, levels=("balanced",))
    work = tmp_path / "work"
    work.mkdir()
    (table,) = measure_family(Setting(work), options)
    heads = [row[0] for row in table.rows]
    optimized = "whole family, after `fragfs optimize`"
    worst = "whole family, worst of 1 other orders"
    assert heads[:4] == ["**whole family**", optimized, worst, f"{worst}, optimized"]
    assert heads[4:] == [row.text for row in ROWS if row.key in ("usual", "copy_bf16", "renamed")]
    tool = table.columns[-1].removeprefix("fragfs").strip() or "fragfs"
    figures = table.figures
    assert 0 < figures[f"family.whole.{tool}"] < figures["family.whole.zstd"] < 1
    assert figures[f"family.optimized.{tool}"] <= figures[f"family.whole.{tool}"] * 1.05
    assert figures[f"family.worst_order.{tool}"] >= figures[f"family.whole.{tool}"] * 0.9
    assert figures["family.renamed.xor"] < 0.02
    assert figures[f"family.ratio_to_xor.{tool}"] > 0


def test_no_family_no_figures(tmp_path):
    with pytest.raises(BenchError, match=MANIFEST):
        measure_family(Setting(tmp_path), FamilyOptions(tmp_path))
