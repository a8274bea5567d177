"""Clusters of text, and experts that are trained apart and mixed."""

import json

import numpy as np
import pytest

from experiments import c_btm
from experiments.clusters import balanced, fit_clusters


def languages(seed, pieces, size=128):
    """Pieces of two languages without a common word, and which is which."""
    draws = np.random.default_rng(seed)
    # The same letters: what follows a letter depends on the language.
    words = [["stone", "river", "mountain"], ["notes", "revir", "tuamonin"]]
    which = draws.integers(2, size=pieces)
    texts = [" ".join(draws.choice(words[k], size)).encode()[:size] for k in which]
    return texts, which


def test_languages_are_told_apart_in_clusters_of_equal_size():
    texts, _ = languages(0, 41)
    texts = [text for text in texts if b"stone" in text][:15] + [
        text for text in texts if b"notes" in text
    ][:15]
    clusters, groups = fit_clusters(texts, 2)
    assert len(set(groups[:15])) == len(set(groups[15:])) == 1 and groups[0] != groups[-1]
    weights = clusters.likely([b"river, mountain", b"revir", b""], temperature=0.1, top=2)
    np.testing.assert_allclose(weights.sum(1), 1)
    assert weights[0, groups[0]] > 0.9 and weights[1, groups[-1]] > 0.9
    np.testing.assert_allclose(weights[2].sum(), 1)  # says nothing, and is no NaN
    one = clusters.likely([b"river, mountain"], temperature=0.1, top=1)
    np.testing.assert_array_equal(one, np.eye(2)[[groups[0]]])


def test_balanced_groups_take_the_nearest_pairs_first():
    rng = np.random.default_rng(0)
    for n, count in ((7, 3), (9, 3), (5, 5), (20, 7)):
        groups = balanced(rng.random((n, count)))
        sizes = np.bincount(groups, minlength=count)
        assert sizes.sum() == n and sizes.max() - sizes.min() <= 1
    distance = np.array([[0.1, 0.9], [0.2, 0.3], [0.05, 0.8], [0.5, 0.6]])
    assert balanced(distance).tolist() == [0, 1, 0, 1]


def test_a_mixture_by_hand_and_bad_input():
    logs = np.log([[[0.5, 0.5]], [[0.25, 0.5]]])
    want = -(np.log2(0.375) + np.log2(0.5)) / 2
    assert c_btm.mixed_bits(logs, np.array([[0.5, 0.5]])) == pytest.approx(want)
    with pytest.raises(ValueError, match="got 3"):
        fit_clusters([b"a b", b"b c"], 3)
    with pytest.raises(ValueError, match="share no words"):
        fit_clusters([b"a", b"b", b"c"], 2)
    clusters, _ = fit_clusters(languages(0, 8)[0], 2)
    with pytest.raises(ValueError, match="1 <= top <= 2"):
        clusters.likely([b"stone"], temperature=1.0, top=3)


def test_experts_found_without_labels_beat_one_model_of_as_many_bytes(tmp_path):
    """The paper's claim in miniature; and no expert is good at the other's text."""
    texts, _ = languages(1, 400)
    data = tmp_path / "text.txt"
    data.write_bytes(b"".join(texts))
    arguments = "--clusters 2 --tops 1 2 --width 16 --context 32 --piece 128 --batch 2 --limit 20"
    arguments += " --seed-steps 20 --steps 80"
    out = tmp_path / "out"
    command = [*arguments.split(), "--data", str(data), "--out", str(out)]
    assert c_btm.main(command) == 0
    found = json.loads((out / "summary.json").read_text())
    bits = found["bits_per_byte"]
    assert abs(found["sizes"][0] - found["sizes"][1]) <= 1
    assert bits["experts, top 1"] < 0.97 * bits["dense"] < bits["before the branch"]
    assert bits["experts, top 1"] < bits["experts, one at random"]
    assert bits["experts, top 2"] < bits["experts, mixed evenly"]
    written = (out / "summary.json").stat().st_mtime_ns
    assert c_btm.main(command) == 0 and (out / "summary.json").stat().st_mtime_ns == written
    assert "| experts, top 1 |" in (out / "table.md").read_text()
    assert c_btm.main([*command, "--out", str(tmp_path / "x"), "--piece", "40"]) == 2
