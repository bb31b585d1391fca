import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lightning_attention.training.tokenizer import END, END_ID, PAD_ID, as_pretrained, token_bytes, train_tokenizer

TEXTS = ["the state of the art of the block\n" * 20, "naïve 漢字 🙂 " * 20]
TOKENIZERS = {size: train_tokenizer(TEXTS, size) for size in (258, 300)}


@given(text=st.text(max_size=60), size=st.sampled_from(list(TOKENIZERS)))
def test_every_text_survives_and_its_bytes_are_counted(text, size):
    tokenizer = TOKENIZERS[size]
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


def test_vocabulary_of_258_is_plain_bytes():
    text = "the naïve 漢字"
    assert TOKENIZERS[258].get_vocab_size() == 258
    assert len(TOKENIZERS[258].encode(text).ids) == len(text.encode())
    assert len(TOKENIZERS[300].encode(text).ids) < 12


def test_text_about_special_tokens_is_text():
    tokenizer = TOKENIZERS[300]
    ids = tokenizer.encode(f"a{END}b").ids
    assert END_ID not in ids
    assert tokenizer.decode(ids) == f"a{END}b"
    assert token_bytes(tokenizer)[[PAD_ID, END_ID]].tolist() == [0, 0]


@pytest.mark.parametrize("text", ["the state  of\n\n the art ,.", "naïve 🙂"])
def test_saved_as_pretrained(tmp_path, text):
    as_pretrained(TOKENIZERS[300]).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(text) == TOKENIZERS[300].encode(text).ids
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (PAD_ID, END_ID, END_ID)
    assert loaded([text, "a"], padding=True)["attention_mask"][1] == [0] * (len(loaded.encode(text)) - 1) + [1]
    talk = [{"role": "user", "content": text}, {"role": "assistant", "content": "so be it"}]
    assert loaded.apply_chat_template(talk, tokenize=False) == f"{text}\nso be it\n"
