"""Images in parquet tables and tar shards, and images of any source that are read when they are wanted."""

import io
import sys
import tarfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from resuscitate.data.images import ImageStream, load_images, load_labels
from resuscitate.errors import CalibrationError


def encoded(pixels):
    """Each image as a PNG file."""
    image = pytest.importorskip("PIL.Image")
    files = []
    for array in pixels:
        buffer = io.BytesIO()
        image.fromarray(array).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


@pytest.fixture
def many():
    return np.random.default_rng(0).integers(0, 256, (11, 6, 5, 3), dtype=np.uint8)


class TestParquet:
    @pytest.fixture(params=["struct", "bytes", "folder"])
    def table(self, request, tmp_path, many):
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        files = encoded(many)
        column = files if request.param == "bytes" else [{"bytes": file, "path": None} for file in files]
        found = pa.table({"other": [b"x"] * 11, "img": column, "label": list(range(11))})
        if request.param != "folder":
            parquet.write_table(found, tmp_path / "part.parquet")
            return tmp_path / "part.parquet"
        parquet.write_table(found.slice(0, 4), tmp_path / "a.parquet")
        parquet.write_table(found.slice(4), tmp_path / "b.parquet")
        return tmp_path

    def test_it_gives_the_images_and_labels_in_one_order(self, table, many):
        images, labels = load_images(table, max_samples=7, seed=3), load_labels(table, max_samples=7, seed=3)
        assert images.shape == (7, 3, 6, 5)
        expected = torch.from_numpy(many[labels.numpy()]).permute(0, 3, 1, 2).float() / 255
        assert torch.equal(images, expected)
        assert torch.equal(load_images(f"parquet:{table}", max_samples=7, seed=3), images)

    def test_ranks_share_it_out_without_padding(self, table):
        whole = load_images(table)
        parts = [load_images(table, shard=(rank, 3)) for rank in range(3)]
        assert [len(part) for part in parts] == [4, 4, 3]
        assert all(torch.equal(part, whole[rank::3]) for rank, part in enumerate(parts))

    def test_what_is_no_table_of_images_is_named(self, tmp_path):
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
        with pytest.raises(CalibrationError, match="not readable parquet"):
            load_images(tmp_path / "broken.parquet")
        parquet.write_table(pa.table({"label": [1]}), tmp_path / "plain.parquet")
        with pytest.raises(CalibrationError, match="no column of encoded images among label"):
            load_images(tmp_path / "plain.parquet")
        parquet.write_table(pa.table({"image": [b"GIF8"]}), tmp_path / "no.parquet")
        with pytest.raises(CalibrationError, match="row 0: not a readable image"):
            load_images(tmp_path / "no.parquet")
        with pytest.raises(CalibrationError, match="no labels"):
            load_labels(tmp_path / "no.parquet")

    def test_a_missing_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(CalibrationError, match=r"pip install 'resuscitate\[parquet\]'"):
            load_images(tmp_path / "x.parquet")


class TestShards:
    @pytest.fixture
    def shards(self, tmp_path, many):
        for shard, rows in (("a", range(4)), ("b", range(4, 11))):
            with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
                files = encoded(many)
                for row in rows:
                    for ending, content in (("png", files[row]), ("cls", str(row).encode()), ("json", b"{}")):
                        member = tarfile.TarInfo(f"{row:03d}.{ending}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
        return tmp_path

    def test_they_give_the_images_and_labels_in_one_order(self, shards, many):
        images, labels = load_images(shards, max_samples=7, seed=3), load_labels(shards, max_samples=7, seed=3)
        assert torch.equal(images, torch.from_numpy(many[labels.numpy()]).permute(0, 3, 1, 2).float() / 255)
        assert len(load_images(shards / "a.tar")) == 4
        assert torch.equal(load_images(f"wds:{shards}", max_samples=7, seed=3), images)

    def test_ranks_share_them_out_without_padding(self, shards):
        whole = load_images(shards)
        assert torch.equal(load_images(shards, shard=(1, 2)), whole[1::2])

    def test_what_is_no_shard_is_named(self, tmp_path):
        (tmp_path / "x.tar").write_bytes(b"no archive" * 200)
        with pytest.raises(CalibrationError, match="not readable tar shards"):
            load_images(tmp_path / "x.tar")


class TestStream:
    """Batches that are read when they are wanted: the images of `load_images`, in its order, none twice."""

    @pytest.fixture(params=["npz", "npy", "folder", "tar"])
    def source(self, request, tmp_path, many):
        if request.param == "npz":
            np.savez(tmp_path / "images.npz", images=many)
            return tmp_path / "images.npz"
        if request.param == "npy":
            np.save(tmp_path / "images.npy", many)
            return tmp_path / "images.npy"
        if request.param == "folder":
            for row, content in enumerate(encoded(many)):
                (tmp_path / f"{row:02d}.png").write_bytes(content)
            return tmp_path
        with tarfile.open(tmp_path / "images.tar", "w") as archive:
            for row, content in enumerate(encoded(many)):
                member = tarfile.TarInfo(f"{row:02d}.png")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return tmp_path / "images.tar"

    @pytest.mark.parametrize("workers", [0, 2])
    def test_workers_read_each_image_once_and_keep_the_order(self, source, workers):
        options = {"mean": 0.5, "std": 0.25, "max_samples": 10, "seed": 1}
        stream = ImageStream(source, batch_size=3, **options)
        batches = list(DataLoader(stream, batch_size=None, num_workers=workers))
        assert (len(stream), stream.images) == (4, 10)
        assert [len(batch) for batch in batches] == [3, 3, 3, 1]
        assert torch.equal(torch.cat(batches), load_images(source, **options))
        assert torch.equal(torch.cat(list(stream)), torch.cat(batches))

    def test_ranks_share_them_out_without_padding(self, source):
        whole = load_images(source)
        for rank in range(3):
            stream = ImageStream(source, batch_size=2, shard=(rank, 3))
            assert torch.equal(torch.cat(list(stream)), whole[rank::3])

    def test_more_ranks_than_images(self, source):
        assert list(ImageStream(source, shard=(11, 12))) == []
