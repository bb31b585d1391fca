import io

import pytest

from lightning_attention.training import encoding as encoding_module
from lightning_attention.training.encoding import Encoding, NotTextError, decoded, find_encoding

RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n"
FRENCH = "L'été dernier, nous avons déjeuné à la fenêtre; où étiez-vous, cher ami? Ça va très bien.\n"
FRENCH_PAGE = (
    "Le petit village s'éveillait lentement sous la brume d'octobre. Les volets s'ouvraient l'un après l'autre, et "
    "déjà la boulangère rangeait ses premières fournées derrière la vitrine embuée. Où étaient passés les élèves ? On "
    "les entendait rire près de la fontaine, là où l'eau coule même pendant les étés secs. Le maître, un homme "
    "sévère mais généreux, les attendait à la porte de l'école. « Dépêchez-vous, dit-il, la leçon commence dans cinq "
    "minutes ! » Personne n'osa répondre. À midi, tout le monde rentrait déjeuner, sauf ceux qui habitaient loin.\n"
)
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n"
POLISH = "Zażółć gęślą jaźń, a potem idź do domu, bo już późno i ciemno się robi. Książka leży na stole.\n"


def read(raw: bytes, asked: str = "auto") -> tuple[str, Encoding]:
    file = io.BytesIO(raw)
    encoding = find_encoding(file, asked)
    return "".join(decoded(file, encoding)), encoding


@pytest.mark.parametrize("lines", [1, 3000])
@pytest.mark.parametrize(
    ("text", "codec"),
    [
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (FRENCH, "latin-1"),
        (FRENCH, "cp1252"),
        (FRENCH_PAGE, "latin-1"),
        (JAPANESE, "shift_jis"),
        (POLISH, "cp1250"),
        *((text, codec) for text in (RUSSIAN, FRENCH, JAPANESE) for codec in ("utf-8", "utf-8-sig", "utf-16")),
        *((text, codec) for text in (RUSSIAN, FRENCH, JAPANESE) for codec in ("utf-32", "utf-32-be")),
        *((text, codec) for text in (RUSSIAN, FRENCH, POLISH) for codec in ("utf-16-le", "utf-16-be")),
    ],
)
def test_every_letter_is_read_as_it_was_written(text, codec, lines):
    raw = (text * lines).encode(codec)
    found, encoding = read(raw)
    assert found == text * lines, encoding
    assert not encoding.damaged


def test_a_few_letters_in_a_long_english_text():
    text = "Plain English words, line by line, and nothing else.\n" * 30_000 + "A café, naïve, on the Straße.\n"
    found, encoding = read(text.encode("latin-1"))
    assert (found == text, encoding.name) == (True, "cp1252")


def test_damaged_utf8_stays_utf8_and_is_counted():
    raw = bytearray((RUSSIAN * 50).encode())
    raw[1001] = 0xFF
    found, encoding = read(bytes(raw))
    assert encoding.name == "utf-8"
    assert 1 <= encoding.damaged <= 2
    assert found.count("\ufffd") == encoding.damaged
    assert read("it holds \ufffd itself".encode())[1] == Encoding("utf-8")


def test_pieces_may_end_within_a_character(monkeypatch):
    monkeypatch.setattr(encoding_module, "PIECE_BYTES", 7)
    assert read((JAPANESE * 4).encode())[0] == JAPANESE * 4


def test_what_is_asked_for_is_used():
    assert read("é".encode("cp437"), "cp437") == ("é", Encoding("cp437"))
    with pytest.raises(NotTextError, match="not ascii: ordinal not in range"):
        read(b"na\xefve", "ascii")


@pytest.mark.parametrize(
    "raw",
    [
        b"\0",
        b"\0\1",
        b"\0\1\2\3",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0",
        b"%PDF-1.4\ntext",
        b"PK\x03\x04text",
        bytes(range(256)) * 40,
    ],
)
def test_what_is_no_text(raw):
    with pytest.raises(NotTextError, match="no text"):
        read(raw)
