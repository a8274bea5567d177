"""Reading text, holding parts out, and batches that are a function of the step."""

import gzip
import math

import numpy as np
import pytest

from experiments import baselines
from experiments.text import BUNDLED, batches, load, windows


@pytest.fixture(scope="module")
def bundled():
    return load(context=256)


def numbered(n):
    return "".join(f"# {i} Name\n\nspeech number {i} " + "word " * 30 + "\n" for i in range(n))


def test_whole_addresses_are_held_out(bundled):
    assert len(bundled.held_out) == 12
    assert bundled.held_out[0] == "# 1800 John Adams"
    assert bundled.held_out[-1] == "# 2019 Donald J Trump"
    raw = gzip.decompress(BUNDLED.read_bytes())
    assert len(bundled.train) + len(bundled.valid) == len(raw)
    train, valid = bundled.train.tobytes(), bundled.valid.tobytes()
    starts = [line for line in raw.split(b"\n") if line.startswith(b"# ")]
    assert len(starts) == 233
    for line in starts:
        assert (b"\n" + line + b"\n" in b"\n" + valid) == (line.decode() in bundled.held_out)
        assert (b"\n" + line + b"\n" in b"\n" + train) != (line.decode() in bundled.held_out)


def test_no_held_out_paragraph_is_in_the_training_text(bundled):
    train = bundled.train.tobytes()
    long = [p for p in bundled.valid.tobytes().split(b"\n") if len(p) > 500]
    assert len(long) >= 12 and not any(p in train for p in long)


def test_text_without_headings_holds_out_its_end(tmp_path):
    path = tmp_path / "own.txt"
    path.write_bytes(bytes(range(97, 122)) * 40)
    text = load(path, context=16)
    assert (text.train.tobytes() + text.valid.tobytes()) == path.read_bytes()
    assert len(text.valid) == 50


def test_gz_and_txt_are_the_same(tmp_path):
    (tmp_path / "a.txt").write_text(numbered(25))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(numbered(25).encode()))
    plain, packed = (load(tmp_path / name, context=8) for name in ("a.txt", "a.txt.gz"))
    np.testing.assert_array_equal(plain.train, packed.train)
    assert plain.digest == packed.digest and plain.held_out == ("# 10 Name",)


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (None, "none.txt", ["does not exist", "--data"]),
        (b"", "empty.txt", ["is empty"]),
        (b" \n", "blank.txt", ["is empty"]),
        (b"abc \xe9t\xe9" * 99, "latin.txt", ["not UTF-8", "0xe9", "offset 4", "iconv"]),
        (b"short text " * 9, "short.txt", ["too short", "held out", "4 of its 99", "17"]),
        (b"no gzip" * 99, "fake.gz", ["cannot be read"]),
        (gzip.compress(b"whole " * 999, mtime=0)[:-9], "torn.gz", ["cannot be read"]),
    ],
)
def test_errors_name_the_file(tmp_path, content, name, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load(path, context=16)
    for word in (name, *words):
        assert word in str(error.value)


def test_a_directory_is_no_text(tmp_path):
    with pytest.raises(ValueError, match="is a directory"):
        load(tmp_path, context=16)


def test_batches_are_a_function_of_seed_and_step():
    text = np.arange(161) % 251

    def make(seed):
        return batches(text.astype(np.uint8), context=8, batch=4, seed=seed)

    first, again = make(0), make(0)
    late = again[7]  # no step needs the ones before
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[7], late)
    assert first[0].shape == (4, 9) and first[0].dtype == np.int32
    assert not np.array_equal(first[0], make(1)[0])


def test_every_epoch_takes_every_window_once_in_another_order():
    text = np.arange(161).astype(np.uint8)  # 20 windows of 8 bytes
    data = batches(text, context=8, batch=4, seed=3)
    epochs = [np.concatenate([data[step][:, 0] for step in range(e, e + 5)]) for e in (0, 5)]
    for starts in epochs:
        assert sorted(starts) == list(range(0, 160, 8))
    assert list(epochs[0]) != list(epochs[1])
    np.testing.assert_array_equal(np.diff(data[2], axis=1), 1)


@pytest.mark.parametrize("length", [17, 24, 25, 26, 100])
def test_windows_measure_every_byte_once(length):
    valid = np.arange(length).astype(np.uint8)
    seen = []
    for tokens, weights in windows(valid, context=8, batch=3):
        assert tokens.shape == (3, 9) and weights.shape == (3, 8)
        seen += list(tokens[:, 1:][weights > 0])
        np.testing.assert_array_equal((tokens[:, 1:] - tokens[:, :-1])[weights > 0], 1)
    assert seen == list(range(1, length))


def test_limited_windows_are_spread():
    valid = np.arange(201).astype(np.uint8)
    found = list(windows(valid, context=8, batch=2, limit=4))
    starts = [row[0] for tokens, _ in found for row in tokens]
    assert starts == [0, 64, 128, 192] and all(weights.all() for _, weights in found)


def test_unigram_is_the_entropy_of_the_counts():
    train = np.frombuffer(b"aaab" * 5000, np.uint8)
    valid = np.frombuffer(b"aaab", np.uint8)
    entropy = 0.75 * math.log2(4 / 3) + 0.25 * 2
    assert baselines.unigram(train, valid) == pytest.approx(entropy, abs=0.03)
    unseen = np.frombuffer(b"z", np.uint8)
    assert baselines.unigram(train, unseen) == pytest.approx(math.log2(20_256))


def test_compressors_on_noise_and_repetition():
    noise = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8)
    same = np.zeros(20_000, np.uint8)
    for measure in (baselines.gzip_alone, baselines.xz_alone):
        assert measure(noise) == pytest.approx(8, abs=0.1)
        assert measure(same) < 0.1
    assert baselines.xz_after_training_text(noise, noise) < 0.2  # copies of at most 273 bytes
    assert baselines.xz_after_training_text(same, noise) == pytest.approx(8, abs=0.2)
    assert set(baselines.all_baselines(same, noise)) == {
        "unigram",
        "gzip",
        "xz",
        "xz after the training text",
    }
