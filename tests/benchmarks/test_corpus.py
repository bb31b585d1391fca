import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pytest

from benchmarks import corpus
from lightning_attention.training.config import make_config
from lightning_attention.training.corpus import SpooledCorpus, spool
from lightning_attention.training.sources import Tally

LONG = "a line of the naïve manual\n" * 20


def tar(**files):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as writer:
        for name, raw in files.items():
            info = tarfile.TarInfo(f"./usr/share/doc/{name}")
            info.size = len(raw)
            writer.addfile(info, io.BytesIO(raw))
    return archive.getvalue()


def deb(data):
    def entry(name, raw):
        return f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(raw):<10}`\n".encode() + raw + b"\n" * (len(raw) % 2)

    return (
        b"!<arch>\n" + entry("debian-binary", b"2.0\n") + entry("control.tar.xz", b"odd") + entry("data.tar.xz", data)
    )


@pytest.fixture
def packages(tmp_path):
    folder = tmp_path / "packages"
    folder.mkdir()
    page = f"<html><style>p {{}}</style><body><p>{LONG} &amp; more</p>\n\n\n<script>x</script></body></html>".encode()
    files = {
        "a.html": page,
        "ls.1.gz": gzip.compress(f"man {LONG}".encode()),
        "x.png": LONG.encode(),
        "b.txt": b"short",
    }
    (folder / "a_1_all.deb").write_bytes(deb(lzma.compress(tar(**files))))
    (folder / "b-1.tar.gz").write_bytes(gzip.compress(tar(**{"c.py": b"# " + LONG.encode(), "d.txt": b"\xff" * 500})))
    with zipfile.ZipFile(folder / "c-1.whl", "w") as archive:
        archive.writestr("c/d.py", "# " + LONG)  # that of b-1.tar.gz
        archive.writestr("c/e.md", "# # " + LONG)
    (folder / "book.txt").write_text("book " + LONG)
    return folder


def test_texts_of_packages(packages, tmp_path, capsys):
    for name in ("one", "two"):
        corpus.main([str(packages), "--out", str(tmp_path / f"{name}.jsonl.gz")])
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()
    lines = [json.loads(line) for line in gzip.decompress((tmp_path / "one.jsonl.gz").read_bytes()).splitlines()]
    assert {line["source"]: line["text"] for line in lines} == {
        "a_1_all.deb: ./usr/share/doc/a.html": f"{LONG} & more\n",
        "a_1_all.deb: ./usr/share/doc/ls.1.gz": f"man {LONG}",
        "b-1.tar.gz: ./usr/share/doc/c.py": f"# {LONG}",
        "book.txt: book.txt": f"book {LONG}",
        "c-1.whl: c/e.md": f"# # {LONG}",
    }
    assert "5 texts, " in capsys.readouterr().err
    read = SpooledCorpus(io.BytesIO())
    spool(make_config({"inputs": [str(tmp_path / "one.jsonl.gz")]}), read, Tally())
    assert read.documents == 5


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("z.deb", b"!<arch>\n", "z.deb is no Debian package: it has no data.tar"),
        ("z.whl", b"no zip", "z.whl is damaged: File is not a zip file"),
        ("z.tar.gz", gzip.compress(tar(**{"c.py": bytes(range(256)) * 400}))[:300], "z.tar.gz is damaged: "),
    ],
    ids=["deb", "whl", "tar"],
)
def test_what_is_no_package_is_said(packages, tmp_path, capsys, name, raw, said):
    (packages / name).write_bytes(raw)
    out = tmp_path / "out.jsonl.gz"
    with pytest.raises(SystemExit):
        corpus.main([str(packages), "--out", str(out)])
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))  # whole or not at all


def test_options_that_cannot_be(packages, tmp_path, capsys):
    out = tmp_path / "out.jsonl.gz"
    for arguments, said in (
        ([tmp_path / "absent", "--out", out], "no such folder: "),
        ([packages, "--out", tmp_path / "absent" / "out.gz"], "no such folder: "),
        ([packages, "--out", out, "--held-out", out], "it must be another file"),
    ):
        with pytest.raises(SystemExit):
            corpus.main(list(map(str, arguments)))
        assert said in capsys.readouterr().err


def test_long_texts_are_held_out(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "LONG", 400)
    monkeypatch.setattr(corpus, "ONE_IN", 1)
    out, kept = tmp_path / "out.jsonl.gz", tmp_path / "kept.jsonl.gz"
    corpus.main([str(packages), "--out", str(out), "--held-out", str(kept)])
    texts = [[json.loads(line)["text"] for line in gzip.decompress(x.read_bytes()).splitlines()] for x in (out, kept)]
    assert texts[1]
    assert not any(len(text) >= 400 for text in texts[0])
    monkeypatch.setattr(corpus, "LONG", 10**6)
    corpus.main([str(packages), "--out", str(out), "--held-out", str(kept)])
    assert "nothing was held out" in capsys.readouterr().err
