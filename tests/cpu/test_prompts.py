"""The built-in prompts, and how prompts become token ids."""

import pytest
from tokenizers.processors import TemplateProcessing

from orthrus_rt import checkpoint, prompts
from tests import byte_tokenizer


def test_built_in_prompts():
    loaded = prompts.load()
    assert len(loaded) >= 50 and len({p.name for p in loaded}) == len(loaded)
    assert [p for kind in prompts.KINDS for p in prompts.load(kind)] == sorted(
        loaded, key=lambda p: prompts.KINDS.index(p.kind)
    )
    assert all(p.text and p.kind in prompts.KINDS for p in loaded)
    with pytest.raises(ValueError, match=r"kind must be one of chat, .*, got 'poem'"):
        prompts.load("poem")


def byte_tokenizer_with_bos():
    """Like Llama's: it begins every text with a token with which its chat template begins too."""
    begins = byte_tokenizer.build()
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", byte_tokenizer.END)]
    )
    begins.chat_template = "<|end|>" + begins.chat_template
    assert begins("a").input_ids[0] == byte_tokenizer.END
    return begins


def embedded_tokenizer():
    return checkpoint.load("smollm2-135m").load_tokenizer()


@pytest.mark.parametrize("build", [byte_tokenizer.build, byte_tokenizer_with_bos, embedded_tokenizer])
def test_chat_ids_are_the_templates(build, request):
    """As transformers itself encodes the turn: no special token twice, none missing."""
    if build is embedded_tokenizer:
        request.getfixturevalue("wheel")
    tokenizer = build()
    for prompt in prompts.load("chat") + prompts.load("math"):
        turns = [{"role": "user", "content": prompt.text}]
        want = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert prompt.encode(tokenizer) == list(want)
    raw = prompts.load("code")[0]
    assert raw.encode(tokenizer) == tokenizer(raw.text).input_ids


def test_a_tokenizer_without_a_template_continues_the_text():
    tokenizer = byte_tokenizer.build()
    tokenizer.chat_template = None
    chat = prompts.load("chat")[0]
    assert chat.encode(tokenizer) == tokenizer(chat.text).input_ids
    with pytest.raises(ValueError, match="the tokenizer has no chat template; use raw text"):
        prompts.encode(tokenizer, "text", chat=True)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{% for m in messages %}", "TemplateSyntaxError: Unexpected end of template"),
        ("{{ messages.bar.baz }}", "UndefinedError: 'list object' has no attribute 'bar'"),
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
    ],
)
def test_a_template_that_fails(template, why):
    tokenizer = byte_tokenizer.build()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"the tokenizer's chat template fails \({why}.*use raw text \(--raw\)"):
        prompts.encode(tokenizer, "text", chat=True)
