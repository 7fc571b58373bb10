"""Files that are broken, or made to harm: refused in plain words, nothing run, no memory filled, nothing else raised.

RESUSCITATE_FUZZ=20000 tries that many of each kind in place of a few.
"""

import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

import resuscitate
from resuscitate.data.calibration import read_batches
from resuscitate.data.images import load_images
from resuscitate.deploy.checkpoints import read_state_dict
from resuscitate.engine.reference import DenseStatistics
from resuscitate.errors import CalibrationError, CheckpointError, JournalError, ResuscitateError
from resuscitate.network.masks import Masks
from tests.networks import chain, images, pruned_copy, seeded

EXAMPLES = int(os.environ.get("RESUSCITATE_FUZZ", "60"))
# of what torch and NumPy do with such files, before they refuse them
pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
often = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def changed(content: bytes, seed: int) -> bytes:
    """A file with some of its bytes flipped, cut out, doubled, replaced by large numbers, or cut off."""
    rng, found = random.Random(seed), bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at, many = rng.randrange(len(found) or 1), rng.choice((1, 2, 8, 64))
        match rng.randrange(6):
            case 0:
                found[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del found[at : at + many]
            case 2:
                found[at:at] = found[at : at + many]
            case 3:
                found[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)))
            case 4:
                del found[at:]
            case 5:
                digits = [i for i, byte in enumerate(found[:4000]) if chr(byte).isdigit()]
                if digits:
                    found[rng.choice(digits)] = ord(rng.choice('0123456789-e."'))
    return bytes(found)


def torch_file(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": chain().state_dict()}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def png_tar() -> bytes:
    image, buffer = pytest.importorskip("PIL.Image"), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for row in range(2):
            file = io.BytesIO()
            image.fromarray(np.full((6, 5, 3), 40 * row, np.uint8)).save(file, "PNG")
            for ending, content in (("png", file.getvalue()), ("cls", b"1")):
                member = tarfile.TarInfo(f"{row}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def arrays(**named: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **named)
    return buffer.getvalue()


def one_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 3, 6, 5), np.uint8))
    return buffer.getvalue()


def written_by(write, name: str, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("seed") / name
    write(path)
    return path.read_bytes()


class Seeds(dict):
    def __repr__(self):
        return "seeds"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A good file of each kind, and what reads it."""
    dense = seeded(chain)
    masks = Masks.from_zeros(pruned_copy(dense))
    statistics = DenseStatistics.measure(dense, images(8))
    named = {"images": np.zeros((4, 6, 5, 3), np.uint8), "labels": np.zeros(4, np.int64)}
    return Seeds(
        {
            "weights.safetensors": (save(dense.state_dict(), {"method": "x"}), read_state_dict),
            "weights.pt": (torch_file(legacy=False), read_state_dict),
            "old.pth": (torch_file(legacy=True), read_state_dict),
            "masks.safetensors": (written_by(masks.save, "m.safetensors", tmp_path_factory), Masks.load),
            "stats.safetensors": (written_by(statistics.save, "s.safetensors", tmp_path_factory), DenseStatistics.load),
            "images.npz": (arrays(**named), load_images),
            "images.npy": (one_array(), load_images),
            "images.tar": (png_tar(), load_images),
        }
    )


@pytest.mark.parametrize(
    "name",
    [
        "weights.safetensors",
        "weights.pt",
        "old.pth",
        "masks.safetensors",
        "stats.safetensors",
        "images.npz",
        "images.npy",
        "images.tar",
    ],
)
@given(seed=st.integers(0, 2**32))
@often
def test_a_broken_file_is_read_or_refused(name, seeds, tmp_path, seed):
    content, read = seeds[name]
    (tmp_path / name).write_bytes(changed(content, seed))
    try:
        found = read(tmp_path / name)
    except (ResuscitateError, OSError) as error:
        assert name in str(error)  # noqa: PT017
    else:
        assert len(found) if isinstance(found, Tensor | dict) else found


@given(seed=st.integers(0, 2**32))
@often
def test_a_broken_journal_is_gone_on_from_or_refused(seed, tmp_path):
    path, dense = tmp_path / "run.journal", seeded(chain)
    path.unlink(missing_ok=True)
    expected = pruned_copy(dense)
    resuscitate.repair(expected, dense, images(8), method="asr", resume=path)
    broken = changed(path.read_bytes(), seed)
    path.write_bytes(broken)
    model = pruned_copy(dense)
    try:
        resuscitate.repair(model, dense, images(8), method="asr", resume=path)
    except JournalError:
        assert path.read_bytes() == broken
    else:
        for ours, theirs in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)


LEAVES = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=3),
    st.floats(),
    st.lists(st.integers(0, 3), min_size=0, max_size=4).map(torch.zeros),
    st.lists(st.integers(0, 3), min_size=0, max_size=4).map(np.zeros),
    st.just(np.array([object()])),
    st.just(np.array(["a"])),
    st.just(torch.zeros(3, 2).to_sparse()),
)
KEYS = st.sampled_from(["image", "images", "x", "labels", "other", 3])
BATCHES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    batches=st.one_of(BATCHES, st.lists(BATCHES, max_size=4)), limit=st.none() | st.integers(1, 5), raw=st.booleans()
)
@often
def test_any_calibration_is_read_or_refused(batches, limit, raw):
    try:
        found = list(read_batches(batches, max_samples=limit, raw=raw))
    except CalibrationError:
        return
    assert found
    if not raw:
        assert all(isinstance(batch, Tensor) and len(batch) for batch in found)
        assert limit is None or sum(map(len, found)) <= limit


class TestMadeToHarm:
    class Payload:
        def __init__(self, command):
            self.command = command

        def __reduce__(self):
            return os.system, (self.command,)

    @pytest.mark.parametrize("kind", ["weights.pt", "plain.pt", "images.npy", "images.npz"])
    def test_a_pickle_does_not_run(self, tmp_path, kind):
        bait, path = self.Payload(f"touch {tmp_path / 'caught'}"), tmp_path / kind
        if kind == "weights.pt":
            torch.save({"state_dict": {"x": torch.zeros(1)}, "bait": bait}, path)
        elif kind == "plain.pt":
            path.write_bytes(pickle.dumps(bait))
        else:
            save_array = np.save if kind.endswith("npy") else np.savez
            save_array(path, np.array([bait], dtype=object))
        with pytest.raises(ResuscitateError, match=kind):
            (read_state_dict if kind.endswith("pt") else load_images)(path)
        assert not (tmp_path / "caught").exists()

    def test_a_checkpoint_that_would_unpack_to_more_than_it_is(self, tmp_path):
        torch.save({"x": torch.zeros(1 << 20)}, tmp_path / "honest.pt")
        with (
            zipfile.ZipFile(tmp_path / "honest.pt") as honest,
            zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
        ):
            for entry in honest.infolist():
                bomb.writestr(entry.filename, honest.read(entry))
        assert (tmp_path / "bomb.pt").stat().st_size < 10_000
        with pytest.raises(CheckpointError, match=r"bomb\.pt: unpacks to 4,\d+,\d+ bytes"):
            read_state_dict(tmp_path / "bomb.pt")

    @pytest.mark.parametrize("shape", ["(1000000000000, 3, 8, 8)", "(-1, 3, 8, 8)", "(2, 3, 8, 8), 'x': 1"])
    def test_an_array_that_claims_to_be_large(self, tmp_path, shape):
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
        header += b" " * (-(len(header) + 11) % 64) + b"\n"
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(100)
        (tmp_path / "a.npy").write_bytes(content)
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("images.npy", content)
        for name in ("a.npy", "a.npz"):
            with pytest.raises(CalibrationError, match=name):
                load_images(tmp_path / name)

    @pytest.mark.parametrize(
        "header",
        [
            {"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
            {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            {"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
            {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
            ["no", "dictionary"],
        ],
        ids=["larger than the file", "wrong size", "unknown dtype", "backwards", "a list"],
    )
    def test_a_safetensors_header_that_lies(self, tmp_path, header):
        text = json.dumps(header).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        for read in (read_state_dict, Masks.load, DenseStatistics.load):
            with pytest.raises(CheckpointError, match=r"a\.safetensors"):
                read(tmp_path / "a.safetensors")

    def test_an_image_that_unpacks_to_more_than_pillow_allows(self, tmp_path, monkeypatch):
        image = pytest.importorskip("PIL.Image")
        image.new("L", (300, 300)).save(tmp_path / "bomb.png")
        monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 300 * 300 // 3)
        with pytest.raises(CalibrationError, match=r"bomb\.png: not a readable image"):
            load_images(tmp_path)

    def test_tensors_of_other_shapes_leave_the_model_as_it_was(self, tmp_path):
        model = seeded(chain)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        state = dict(before)
        state["3.weight"] = torch.zeros(8, 8, 5, 5)
        state["10.weight"] = torch.zeros(0)
        save_file(state, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=r"a\.safetensors does not fit the model: .*3\.weight"):
            resuscitate.deploy.checkpoints.load_weights(model, tmp_path / "a.safetensors")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
