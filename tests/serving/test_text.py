import gc
import itertools

import pytest
import torch

from lightning_attention.errors import InputError
from lightning_attention.models.pretrained import load_model, load_tokenizer
from lightning_attention.serving import engine
from lightning_attention.serving.text import Generator, Prompt
from lightning_attention.training.tokenizer import END_ID, PAD_ID
from tests.support.tokenizers import metaspace
from tests.training.tiny import tiny_settings, train

PROMPTS = ["the state of", "", "attention naïve 漢字 " * 5, "a"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    trainer, outcome = train(tiny_settings(tmp_path_factory.mktemp("run"), steps=30, eval_every=0, save_every=0))
    return trainer, outcome.checkpoint


@pytest.fixture(scope="module")
def generator(trained):
    return Generator(load_model(trained[1]), load_tokenizer(trained[1]))


def asked(prompts, *, seed=0, **settings):
    how = {"max_tokens": 40, "temperature": 1.0, "top_p": 1.0, "ignore_eos": True, **settings}
    return [Prompt(text, seed=seed + i, **how) for i, text in enumerate(prompts)]


def texts(generator, prompts, *, max_batch=256, **settings):
    found = [""] * len(prompts)
    for pieces in generator.stream(asked(prompts, **settings), max_batch=max_batch):
        for number, text, _ in pieces:
            found[number] += text
    return found


def test_greedy_text_is_what_the_model_says_token_by_token(trained, generator):
    trainer, _ = trained
    tokenizer = trainer.data.tokenizer
    for prompt, text in zip(PROMPTS, texts(generator, PROMPTS, temperature=0), strict=True):
        ids = tokenizer.encode(prompt).ids or [END_ID]
        start = len(ids)
        for _ in range(40):
            with torch.no_grad():
                logits = trainer.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            logits[PAD_ID] = -torch.inf
            ids.append(int(logits.argmax()))
        whole = tokenizer.decode(ids[start:])
        assert whole.rstrip("�") == text  # an unfinished last character is not printed


def test_a_space_before_the_first_new_word_stays(monkeypatch):
    """Tokenizers as Llama's leave it out where a text begins."""
    tokenizer = metaspace()
    new = tokenizer.encode("of the", add_special_tokens=False)

    class Scripted:
        room, busy, left = 1, False, list(new)

        def submit(self, request):
            assert list(request.prompt) == tokenizer.encode("the of", add_special_tokens=False)
            self.busy = True
            return 0

        def step(self):
            token = self.left.pop(0)
            self.busy = bool(self.left)
            return [(0, token, None if self.busy else "length")]

    monkeypatch.setattr("lightning_attention.serving.text.ContinuousBatch", lambda *_, **__: Scripted())
    assert texts(Generator(None, tokenizer), ["the of"]) == [" of the"]


def test_a_prompts_text_does_not_depend_on_the_others(generator):
    together = texts(generator, PROMPTS, seed=5)
    assert together == [texts(generator, [prompt], seed=5 + i)[0] for i, prompt in enumerate(PROMPTS)]
    assert len({*together}) == len(PROMPTS)
    assert together != texts(generator, PROMPTS, seed=6)


@pytest.mark.parametrize("max_batch", [1, 2, 3])
def test_prompts_that_wait_for_others_get_the_same(generator, max_batch):
    many = [*PROMPTS, "", "of the", *PROMPTS]
    assert texts(generator, many, max_batch=max_batch, seed=2) == texts(generator, many, seed=2)


def test_prompts_longer_than_a_step_reads(generator, monkeypatch):
    wanted = texts(generator, PROMPTS, temperature=0)
    for tokens in (1, 3):
        monkeypatch.setitem(engine.ContinuousBatch.__init__.__kwdefaults__, "prefill_tokens", tokens)
        assert texts(generator, PROMPTS, temperature=0) == wanted


def test_a_special_token_in_a_prompt_is_text(generator):
    # As it is in the text that was trained on: only the generator itself begins and ends a document.
    ids = generator._request(Prompt("a<|endoftext|>b<|padding|>")).prompt
    assert END_ID not in ids
    assert PAD_ID not in ids
    assert generator._tokenizer.decode(ids) == "a<|endoftext|>b<|padding|>"
    assert generator._request(Prompt("")).prompt == (END_ID,)


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": float("nan")}, {"seed": 2**64}, {"top_p": 2}])
def test_a_prompt_that_is_wrong_is_not_made(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Prompt("a", **wrong)
    with pytest.raises(TypeError, match="text is a bytes"):
        Prompt(b"a")


def test_never_broken_characters(generator):
    # At a high temperature the little model throws bytes about; what is complete comes out, whole and in order.
    steps = list(generator.stream(asked(["漢"], max_tokens=400, temperature=3.0)))
    found = [text for ((_, text, _),) in steps]
    assert len(found) == 400
    for text in found:
        assert text.encode("utf-8").decode("utf-8") == text
    assert "" in found[:-1]  # some token is a part of a character


def script(monkeypatch, *steps):
    """Let the next tokens be these, a list for every step."""
    scripted = iter(steps)
    monkeypatch.setattr(engine, "sample", lambda *_: torch.tensor(next(scripted)))
    return scripted


def test_ends_at_the_end_of_a_document(generator, monkeypatch):
    scripted = script(monkeypatch, [5, 5], [END_ID, 6], [7], [END_ID], [8])
    decode = generator._tokenizer.backend_tokenizer.decode
    assert texts(generator, ["a", "b"], ignore_eos=False) == [decode([5]), decode([5, 6, 7])]
    assert next(scripted) == [8]  # nothing was generated after both had ended


def test_says_why_a_text_ended(generator, monkeypatch):
    script(monkeypatch, [5, 5], [END_ID, 6], [7])
    steps = list(generator.stream(asked(["a", "b"], max_tokens=3, ignore_eos=False)))
    assert [[piece.finished for piece in pieces] for pieces in steps] == [[None, None], ["stop", None], ["length"]]
    assert steps[1][0] == (0, "", "stop")


def test_end_of_document_can_be_ignored(generator, monkeypatch):
    script(monkeypatch, [5], [END_ID], [7])
    assert texts(generator, ["a"], max_tokens=3) == [generator._tokenizer.backend_tokenizer.decode([5, 7])]


def test_memory_is_constant_in_the_length(generator):
    def tensors() -> list[torch.Tensor]:
        gc.collect()
        return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]

    # What other tests left in this process is kept for as long as this one lasts, and is no part of what it counts.
    others = tensors()
    known = {id(t) for t in others}

    def live_bytes() -> int:
        return sum(t.untyped_storage().nbytes() for t in tensors() if id(t) not in known)

    def skip(tokens: int) -> None:
        for _ in itertools.islice(stream, tokens):
            pass

    stream = generator.stream(asked(["the state", "a"], max_tokens=1000))
    skip(100)
    at_100 = live_bytes()
    skip(500)
    assert live_bytes() == at_100
    # The measure sees what the smallest of growing caches would add: one number for every further token.
    kept = torch.zeros(500)
    assert live_bytes() == at_100 + kept.nbytes


def test_folders_that_hold_no_model_of_this_kind(tmp_path, trained):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match="holds a gpt2; this needs a transnormer"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text((trained[1] / "config.json").read_text())
    with pytest.raises(InputError, match="cannot load the model in ") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
