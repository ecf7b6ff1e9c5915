"""What the localist classes add to the native ones must leave those whole: initialisation, arguments, generation."""

import asyncio
import contextvars
import pickle
import threading

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Cache,
    ContinuousBatchingConfig,
    DynamicCache,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationConfig,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils import ModelOutput

from localist_hf import LocalistGPT2Config, LocalistGPT2LMHeadModel, LocalistGPT2Model
from localist_hf.modeling import locality_dial
from localist_hf.modeling.local_cache import LocalCacheLayer
from localist_hf.modeling.locality_mixin import LocalistGenerationMixin
from localist_hf.modeling.locality_request import LOCALIST_ATTENTION


LOCAL = {"locality_schedule": "localist"}


def cache_of(outputs: ModelOutput) -> Cache | None:
    """The cache, which transformers 5.24 has given another name."""
    return outputs.get("cache", outputs.get("past_key_values"))


# --- initialisation


def native_config(config: LocalistGPT2Config) -> GPT2Config:
    names = GPT2Config.__dataclass_fields__.keys() - {"model_type"}
    return GPT2Config(**{name: getattr(config, name) for name in names})


@pytest.mark.parametrize(
    ("native", "localist"), [(GPT2Model, LocalistGPT2Model), (GPT2LMHeadModel, LocalistGPT2LMHeadModel)]
)
def test_fresh_weights_are_those_of_gpt2_for_the_same_seed(make_config, native, localist) -> None:
    config = make_config(initializer_range=0.02)
    torch.manual_seed(7)
    expected = native(native_config(config)).state_dict()
    for make in (localist, localist._from_config):
        torch.manual_seed(7)
        actual = make(config).state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_residual_projections_start_small(make_config) -> None:
    model = AutoModelForCausalLM.from_config(make_config(n_embd=128, initializer_range=0.02))
    for name, weight in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert weight.std().item() == pytest.approx(0.02 / (2 * 4) ** 0.5, rel=0.05)


def test_weights_that_a_checkpoint_lacks_are_made_as_gpt2_makes_them(make_model, tmp_path) -> None:
    make_model().save_pretrained(tmp_path)
    loaded = LocalistGPT2LMHeadModel.from_pretrained(tmp_path, n_layer=6, initializer_range=0.02)
    kept, made = (loaded.transformer.h[layer].attn.c_proj.weight.std().item() for layer in (0, 5))
    assert kept == pytest.approx(0.3 / 8**0.5, rel=0.1)
    assert made == pytest.approx(0.02 / 12**0.5, rel=0.1)


def test_a_configuration_of_gpt2_is_refused_at_once(make_config) -> None:
    for model_class in (LocalistGPT2Model, LocalistGPT2LMHeadModel):
        with pytest.raises(ValueError, match="`config` is a GPT2Config; it must be a LocalistGPT2Config"):
            model_class(native_config(make_config()))


def test_a_plain_model_saved_with_our_configuration_has_the_code_that_its_auto_map_names(
    make_config, make_text, tmp_path
) -> None:
    model = GPT2LMHeadModel(make_config())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_localist_gpt2.py").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(loaded(make_text(1, 9)).logits, model.eval()(make_text(1, 9)).logits)


def test_remote_models_are_one_class_and_can_be_pickled(make_model, make_text, tmp_path) -> None:
    make_model().save_pretrained(tmp_path)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True) for _ in range(2))
    assert type(one) is type(other)
    copy = pickle.loads(pickle.dumps(one))
    assert torch.equal(copy(make_text(1, 9)).logits, one(make_text(1, 9)).logits)


def test_a_subclass_may_have_its_own_forward(make_config, make_text) -> None:
    class Doubled(LocalistGPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = 2 * outputs.logits
            return outputs

    model, ids = Doubled(make_config()).eval(), make_text(1, 30)
    outputs = model(ids, output_fidelity=True)
    assert len(outputs.fidelity) == 4
    assert torch.equal(outputs.logits, 2 * LocalistGPT2LMHeadModel.forward(model, ids).logits)


# --- arguments and caches


@pytest.mark.parametrize("layers", [[], [0], [0, 1]])
def test_a_bounded_cache_goes_on_at_no_other_dial_whatever_is_measured(make_model, make_text, layers) -> None:
    model, ids = make_model(locality_schedule=[0.0, 0.0, 1.0, 1.0]), make_text(1, 60)
    with torch.no_grad():
        cache = model(ids[:, :50], locality_dial=1.0, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="key-value cache was filled at dial 1"):
            model(ids[:, 50:], past_key_values=cache, output_fidelity=layers)


@pytest.mark.parametrize("dial", [0.5, 1.0])
def test_a_step_without_the_explicit_starts_of_the_prompt_is_right_or_refused(make_model, make_text, dial) -> None:
    model, ids = make_model(**LOCAL), make_text(2, 41)
    starts = (torch.arange(40) // 10 * 10).expand(2, -1)
    with torch.no_grad():
        cache = model(ids[:, :40], block_starts=starts, locality_dial=dial, use_cache=True).past_key_values
        if dial == 1:
            with pytest.raises(ValueError, match=r"keeps of layer 0 its blocks only, .* it was filled without one, or"):
                model(ids[:, 40:], past_key_values=cache, locality_dial=dial)
        else:
            step = model(ids[:, 40:], past_key_values=cache, locality_dial=dial, output_fidelity=[0])
            whole = model(ids, locality_dial=dial, output_fidelity=[0])
            assert torch.equal(step.block_starts[0], whole.block_starts[0][:, 40:])
            assert_close(step.fidelity[0], whole.fidelity[0][:, :, 40:])


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 9])
def test_a_cache_of_dial_1_goes_on_where_more_layers_are_measured(make_model, make_text, length) -> None:
    """The searches for the blocks of the layers that were filled with one go on; those of the others start anew."""
    model, ids = make_model(locality_schedule=[0.0, 0.0, 1.0, 1.0], num_sink_tokens=1), make_text(2, 50)
    whole = model(ids, locality_dial=1.0, output_fidelity=True)
    cache = DynamicCache(config=model.config)
    model(ids[:, :-length], past_key_values=cache, locality_dial=1.0)
    step = model(ids[:, -length:], past_key_values=cache, locality_dial=1.0, output_fidelity=True)
    for name in ("block_starts", "fidelity", "block_share"):
        for one, other in zip(getattr(step, name), getattr(whole, name), strict=True):
            assert_close(one, other[..., -length:], atol=1e-5, rtol=0)
    assert_close(step.logits, whole.logits[:, -length:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_a_layer_of_dial_1_has_dropped_is_not_searched_for_a_layer_above(make_model, make_text) -> None:
    model, ids = make_model(locality_schedule=[0.0, 0.0, 1.0, 0.0], semantic_layer=3), make_text(1, 50)
    cache = model(ids[:, :49], locality_dial=1.0, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"keeps of layer 2 its blocks only, .* the blocks of layer 3 stands: it was"):
        model(ids[:, 49:], past_key_values=cache, locality_dial=1.0, output_fidelity=True)


@torch.no_grad()
@pytest.mark.parametrize("partition", ["semantic", "delimiter"])
@pytest.mark.parametrize(("before", "after"), [(1.0, 0.0), (1.0, 0.5), (1.0, 1.0), (0.5, 1.0)])
def test_a_cache_that_is_reset_is_as_a_new_one(make_model, make_text, partition, before, after) -> None:
    model, ids = make_model(**LOCAL, block_partition=partition, num_sink_tokens=1), make_text(2, 40)
    expected = model(ids, locality_dial=after).logits
    cache = DynamicCache(config=model.config)
    model(make_text(1, 35), past_key_values=cache, locality_dial=before)
    cache.reset()
    pieces = [model(ids[:, at], past_key_values=cache, locality_dial=after).logits for at in (slice(30), slice(30, 40))]
    assert_close(torch.cat(pieces, dim=1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_delimiters_are_found_again_after_tokens_were_removed(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL, block_partition="delimiter"), make_text(2, 40)
    request = {"locality_dial": 0.5, "output_fidelity": True}
    cache, whole = DynamicCache(config=model.config), model(ids, **request)
    model(torch.cat((ids[:, :30], ids[:, :6]), dim=1), past_key_values=cache, **request)
    cache.crop(-6)
    cache.reorder_cache(torch.tensor([1, 0]))
    step = model(ids[[1, 0], 30:], past_key_values=cache, **request)
    assert torch.equal(step.block_starts[0], whole.block_starts[0][[1, 0], 30:])
    assert_close(step.logits, whole.logits[[1, 0], 30:], atol=1e-5, rtol=0)
    model(ids[:, :1], past_key_values=cache)  # nobody asks for blocks
    with pytest.raises(ValueError, match="nor a cache that was filled without a search for delimiters"):
        model(ids[:, :1], past_key_values=cache, **request)


class OtherCache(Cache):
    """Stands for a cache that gives back other values than it was given, as a quantised one does."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)


def test_a_cache_that_may_change_the_values_is_refused_by_name(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL), make_text(1, 20)
    with pytest.raises(ValueError, match=r"do not work with a cache of this kind \(OtherCache\); use a `DynamicCache`"):
        model(ids, past_key_values=OtherCache(), locality_dial=0.5)
    assert model(ids, past_key_values=OtherCache()).logits.isfinite().all()


@pytest.mark.parametrize("request_", [{"locality_dial": 0.7}, {"min_fidelity": 0.8}, {"locality_dial": 1.0}, {}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gives_no_gradient_that_is_no_number(make_model, make_text, side, request_) -> None:
    model, ids = make_model(**LOCAL, initializer_range=2.0), make_text(2, 40)  # scores of hundreds
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    mask = mask.flip(1) if side == "right" else mask
    outputs = model(ids, attention_mask=mask, output_fidelity=True, output_entropy=True, **request_)
    total = (outputs.logits * mask[..., None]).sum() + sum(outputs.fidelity).mean() + sum(outputs.entropy).mean()
    total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    "fields",
    [{"max_block_length": 10**6}, {"block_partition": "window", "window_length": 10**6}, {"num_sink_tokens": 10**6}],
    ids=str,
)
@torch.no_grad()
def test_lengths_beyond_the_text_cost_no_more_than_its_own(make_model, make_text, fields) -> None:
    ids = make_text(1, 70)
    longest = {name: value if isinstance(value, str) else 300 for name, value in fields.items()}
    for arguments in ({"output_fidelity": True}, {"locality_dial": 0.5}, {"locality_dial": 1.0}):
        huge, long = (make_model(**LOCAL, **values)(ids, **arguments) for values in (fields, longest))
        assert_close(huge.logits, long.logits)
        if huge.fidelity is not None:
            assert_close(huge.fidelity, long.fidelity)


def test_a_dial_without_local_layers_says_that_it_changes_nothing(make_model, make_text, transformers_warnings) -> None:
    make_model(locality_schedule="distributed")(make_text(1, 9), locality_dial=0.8)
    assert "`locality_dial` is 0.8" in transformers_warnings.text
    assert "no layer is local under the `locality_schedule` 'distributed'" in transformers_warnings.text


class AtDial(torch.nn.Module):
    """A module that takes tokens and gives logits, for tracing and exporting."""

    def __init__(self, model: LocalistGPT2LMHeadModel, dial: float) -> None:
        super().__init__()
        self.model, self.dial = model, dial

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, locality_dial=self.dial, min_fidelity=0.0, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_tracing_is_refused_above_dial_0_and_gpt2s_at_0(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL), make_text(1, 20)
    traced = torch.jit.trace(AtDial(model, 0.0), ids)
    assert_close(traced(make_text(1, 33)), model(make_text(1, 33)).logits)
    with pytest.raises(ValueError, match=r"do not work under `torch\.jit\.trace`"):
        torch.jit.trace(AtDial(model, 0.5), ids)


@torch.no_grad()
def test_export_of_any_length_at_dial_0_and_of_one_length_above(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL, n_layer=2), make_text(1, 20)
    any_length = {"ids": {1: torch.export.Dim("length", min=2, max=200)}}
    exported = torch.export.export(AtDial(model, 0.0), (ids,), dynamic_shapes=any_length, strict=False)
    assert_close(exported.module()(make_text(1, 33)), model(make_text(1, 33)).logits)
    exported = torch.export.export(AtDial(model, 0.5), (ids,), strict=False)
    assert_close(exported.module()(ids), model(ids, locality_dial=0.5).logits)
    with pytest.raises(ValueError, match="can be exported for texts of one length only"):
        torch.export.export(AtDial(model, 0.5), (ids,), dynamic_shapes=any_length, strict=False)


# --- the setting of the dial


def test_a_dial_set_in_one_thread_leaves_the_others_alone(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL), make_text(1, 30)
    with torch.no_grad():
        dials = [0.0, 0.4, 0.8, 1.0]
        expected = [model(ids, locality_dial=dial).logits for dial in dials]
        wrong, start = [], threading.Barrier(len(dials))

        def serve(at: int) -> None:
            start.wait()
            with torch.no_grad(), model.set_locality_dial(dials[at]):
                for _ in range(20):
                    if not torch.equal(model(ids).logits, expected[at]):
                        wrong.append(dials[at])

        threads = [threading.Thread(target=serve, args=(at,)) for at in range(len(dials))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert torch.equal(model(ids).logits, expected[0])


def test_a_dial_set_in_one_task_leaves_the_others_alone(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL), make_text(1, 30)

    async def serve(dial: float) -> bool:
        with model.set_locality_dial(dial):
            await asyncio.sleep(0)
            return torch.equal(model(ids).logits, model(ids, locality_dial=dial).logits)

    async def serve_all() -> list[bool]:
        return await asyncio.gather(*map(serve, (0.0, 0.3, 0.9)))

    assert asyncio.run(serve_all()) == [True] * 3


def test_a_dial_set_inside_an_asyncio_task_holds_after_its_parent_has_left_its_own(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL), make_text(1, 40)
    expected = {dial: model(ids, locality_dial=dial).logits for dial in (0.0, 0.4, 0.9)}

    async def serve(has_left: asyncio.Event, dial: float | None) -> torch.Tensor:
        if dial is not None:
            model.set_locality_dial(dial)
        await has_left.wait()
        return model(ids).logits

    async def parent() -> list[torch.Tensor]:
        has_left = asyncio.Event()
        with model.set_locality_dial(0.9):
            tasks = [asyncio.create_task(serve(has_left, dial)) for dial in (0.4, None)]  # the second inherits it
            await asyncio.sleep(0)
        has_left.set()
        return [await task for task in tasks] + [model(ids).logits]

    for logits, dial in zip(asyncio.run(parent()), (0.4, 0.9, 0.0), strict=True):
        assert torch.equal(logits, expected[dial])


def test_settings_are_counted_as_long_as_any_context_holds_them(make_model) -> None:
    model, before = make_model(**LOCAL), locality_dial._num_alive
    with model.set_locality_dial(0.5):
        context = contextvars.copy_context()
        assert locality_dial._num_alive == before + 1
    assert locality_dial._num_alive == before + 1
    del context
    assert locality_dial._num_alive == before


def test_two_models_have_two_dials(make_model, make_text) -> None:
    one, other, ids = make_model(0, **LOCAL), make_model(1, **LOCAL), make_text(1, 30)
    with torch.no_grad(), one.set_locality_dial(0.5):
        plain = other(ids).logits
        with other.set_locality_dial(0.9):
            assert torch.equal(one.transformer(ids)[0], one.transformer(ids, locality_dial=0.5)[0])
            assert torch.equal(other(ids).logits, other(ids, locality_dial=0.9).logits)
        assert torch.equal(other(ids).logits, plain)
        assert torch.equal(one(ids).logits, one(ids, locality_dial=0.5).logits)


def test_a_compiled_model_sees_the_dial_of_its_thread(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL, n_layer=1), make_text(1, 30)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(ids, use_cache=False).logits
        for dial in (0.5, 1.0):
            with model.set_locality_dial(dial):
                actual = compiled(ids, use_cache=False).logits
            assert_close(actual, model(ids, locality_dial=dial).logits)
        assert torch.equal(compiled(ids, use_cache=False).logits, plain)


def test_a_bad_dial_in_the_configuration_is_refused_at_the_call(make_model, make_text) -> None:
    model = make_model(**LOCAL)
    model.config.locality_dial = 1.5
    with pytest.raises(ValueError, match=r"`config.locality_dial` is 1.5; it must lie in \[0, 1\]"):
        model(make_text(1, 9))


# --- generation

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def test_guidance_runs_both_branches_at_the_dial(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL), make_text(1, 40)
    negative = make_text(1, 30, seed=5)
    guided = {**GREEDY, "guidance_scale": 3.0, "negative_prompt_ids": negative}
    actual = model.generate(ids, locality_dial=0.9, **guided, output_scores=True, return_dict_in_generate=True)
    model.config.locality_dial = 0.9
    expected = model.generate(ids, **guided, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(map(torch.equal, actual.scores, expected.scores))
    model.config.locality_dial = 0.0
    with torch.no_grad():
        one, other = (model(tokens, locality_dial=0.9).logits[:, -1].log_softmax(-1) for tokens in (ids, negative))
    assert_close(actual.scores[0], other + 3.0 * (one - other), atol=1e-4, rtol=1e-4)


def test_generation_from_embeddings_is_that_from_tokens(make_model, make_text, gpt2_twin) -> None:
    model, ids = make_model(**LOCAL), make_text(2, 30)
    embeddings = model.get_input_embeddings()(ids)
    for setting in ({}, {"locality_dial": 0.7}, {"locality_dial": 1.0}):
        expected = model.generate(ids, **GREEDY, **setting)[:, 30:]
        assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY, **setting), expected)
    twin = gpt2_twin(model)
    assert torch.equal(
        model.generate(inputs_embeds=embeddings, **GREEDY), twin.generate(inputs_embeds=embeddings, **GREEDY)
    )


@pytest.mark.parametrize("dial", [0.6, 1.0])
@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
@pytest.mark.parametrize("partition", ["semantic", "delimiter"])
def test_speculative_decoding_gives_what_greedy_decoding_gives(make_model, make_text, dial, how, partition) -> None:
    model = make_model(**LOCAL, block_partition=partition)
    ids = make_text(1, 10).repeat(1, 4)
    speculation = (
        {"prompt_lookup_num_tokens": 4} if how == "prompt lookup" else {"assistant_model": make_model(5, n_layer=1)}
    )
    expected = model.generate(ids, **GREEDY, locality_dial=dial)
    assert torch.equal(model.generate(ids, **GREEDY, locality_dial=dial, **speculation), expected)


def test_continuous_batching_is_gpt2s_and_leaves_the_attention_as_it_was(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL), make_text(2, 20)
    model.generation_config.update(**GREEDY)
    small = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=64)  # by default most of the memory
    results = model.generate_batch(ids.tolist(), warmup=False, continuous_batching_config=small)
    generated = [result.generated_tokens for result in results.values()]
    assert generated == model.generate(ids, **GREEDY)[:, 20:].tolist()
    assert model.config._attn_implementation == LOCALIST_ATTENTION["sdpa"]
    model.config.locality_dial = 0.5
    with pytest.raises(ValueError, match=r"`locality_dial` is 0\.5.*continuous batching allows 0 only"):
        model.generate_batch(ids.tolist())
    assert model.config._attn_implementation == LOCALIST_ATTENTION["sdpa"]


@pytest.mark.parametrize("dial", [0.0, 0.5, 1.0])
def test_as_the_decoder_of_an_encoder_it_has_its_dial(make_model, make_text, gpt2_twin, dial) -> None:
    decoder = make_model(**LOCAL, add_cross_attention=True, is_decoder=True)
    encoder = gpt2_twin(make_model(3)).transformer
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, decoder.config)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder, config=config).eval()
    source = make_text(2, 15)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    with decoder.set_locality_dial(dial):
        texts = [model.generate(source, use_cache=use_cache, **settings) for use_cache in (True, False)]
    assert torch.equal(*texts)
    if dial == 0:
        twin = gpt2_twin(decoder)
        native = EncoderDecoderModel(encoder=encoder, decoder=twin, config=config).eval()
        assert torch.equal(native.generate(source, **settings), texts[0])
    if dial == 1:
        cache = decoder(source, encoder_hidden_states=encoder(source)[0], locality_dial=1.0).past_key_values
        assert all(isinstance(layer, LocalCacheLayer) for layer in cache.self_attention_cache.layers)


def test_positional_arguments_are_gpt2s(make_model, make_text) -> None:
    model, ids = make_model(), make_text(1, 12)
    cache = DynamicCache()
    model(ids[:, :8], cache)
    assert_close(model(ids[:, 8:], cache).logits, model(ids).logits[:, 8:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dial", [0.6, 1.0])
@pytest.mark.parametrize("partition", ["semantic", "delimiter", "window"])
@pytest.mark.parametrize("chunk", [5, 16])
def test_prefill_in_chunks_gives_what_one_prefill_gives(make_model, make_text, partition, dial, chunk) -> None:
    """Rows of different padding, of which one has nothing but padding in its first chunks."""
    model = make_model(**LOCAL, block_partition=partition, num_sink_tokens=1, num_previous_blocks=1)
    ids = make_text(3, 40)
    mask = torch.ones_like(ids)
    mask[0, :17], mask[1, :6] = 0, 0
    settings = {**GREEDY, "attention_mask": mask, "locality_dial": dial}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **settings)
    actual = model.generate(ids, **settings, prefill_chunk_size=chunk)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_close(torch.stack(actual.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


# --- what reaches the attention


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("dial", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_a_cache_goes_by_both_of_its_names(make_model, make_text, name: str, dial: float) -> None:
    model, ids = make_model(**LOCAL, block_partition="window"), make_text(2, 30)
    whole = model(ids, locality_dial=dial).logits
    for kind in (model, model.transformer):
        cache = DynamicCache(config=model.config)
        kind(ids[:, :20], **{name: cache}, locality_dial=dial)
        assert cache.get_seq_length() == 20
    last = model(ids[:, 20:], **{name: DynamicCache(config=model.config)}, locality_dial=dial)
    assert not torch.allclose(last.logits, whole[:, 20:], atol=1e-3)  # without the cache it is another text
    last = model(ids[:, 20:], **{name: cache}, locality_dial=dial)
    assert_close(last.logits, whole[:, 20:], atol=1e-5, rtol=0)
    texts = [model.generate(ids, **{name: DynamicCache(config=model.config)}, **GREEDY, locality_dial=dial)]
    texts += [model.generate(ids, **GREEDY, use_cache=use_cache, locality_dial=dial) for use_cache in (True, False)]
    assert all(torch.equal(text, texts[0]) for text in texts)


NUMBERS = torch.zeros(1, 8)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"attention_mask": {"full_attention": NUMBERS}}, r"`attention_mask` is a dict; .* its shape must be \(1, 8\)"),
        ({"past_key_values": ((NUMBERS, NUMBERS),)}, r"do not work with a cache of this kind \(tuple\); use a `Dyn"),
        ({"block_starts": NUMBERS}, "`block_starts` is torch.float32; it must be a tensor of whole numbers"),
        ({"local_starts": [[0] * 8]}, "`local_starts` is a list; it must be a tensor of whole numbers"),
        ({"input_ids": NUMBERS[:, :0].long()}, "hold no token; there is nothing to measure or to hold"),
        ({"output_fidelity": ["last", 0]}, r"`output_fidelity` asks for layers \['last', 0\]; the model has 0 to 3"),
        ({"output_fidelity": [1.0]}, r"`output_fidelity` asks for layers \[1.0\]; the model has 0 to 3"),
        ({"output_fidelity": 0.5}, "`output_fidelity` is 0.5; it must be a bool or a list of layers"),
        ({"locality_dial": "0.5"}, r"`locality_dial` is '0.5'; it must lie in \[0, 1\]"),
    ],
)
def test_what_is_of_another_kind_is_refused_by_name(make_model, make_text, request_, message) -> None:
    inputs = {"input_ids": make_text(1, 8), "locality_dial": 0.5, **request_}
    with pytest.raises(ValueError, match=message):
        make_model(**LOCAL)(**inputs)


def test_speculation_with_a_cache_of_the_callers(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL), make_text(1, 10).repeat(1, 4)
    settings = {**GREEDY, "prompt_lookup_num_tokens": 4, "locality_dial": 1.0}
    cache = DynamicCache(config=model.config)
    expected = model.generate(ids, **GREEDY, locality_dial=1.0)
    assert torch.equal(model.generate(ids, **settings, past_key_values=cache), expected)
    with pytest.raises(ValueError, match=r"do not work with a cache of fixed size|not supported with Static cache"):
        model.generate(ids, **settings, cache_implementation="static")
    model.generation_config.cache_implementation = "hybrid"
    assert torch.equal(model.generate(ids, **settings), expected)


def test_two_caches_are_refused(make_model, make_text) -> None:
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are both given"):
        make_model()(make_text(1, 8), cache=DynamicCache(), past_key_values=DynamicCache(), locality_dial=0.5)


@pytest.mark.parametrize("request_", [{"locality_dial": 0.5}, {"output_fidelity": True}])
def test_a_transformers_that_calls_its_arguments_otherwise_is_refused(make_model, make_text, request_) -> None:
    class Renamed(GPT2LMHeadModel):
        def forward(
            self, input_ids=None, memory=None, attention_mask=None, use_cache=None, **kwargs
        ) -> CausalLMOutputWithCrossAttentions:
            return super().forward(input_ids, memory, attention_mask, use_cache=use_cache, **kwargs)

    class Localist(LocalistGenerationMixin, Renamed, GenerationMixin):
        config_class = LocalistGPT2Config

    model = make_model(**LOCAL)
    other = Localist(model.config)
    other.load_state_dict(model.state_dict())
    ids = make_text(1, 20)
    assert_close(other(ids).logits, model(ids).logits, atol=1e-6, rtol=0)  # nothing is asked for
    with pytest.raises(
        ValueError, match=r"`forward` of Localist has no argument `cache` or `past_key_values` in transf"
    ):
        other(ids, **request_)
    with pytest.raises(ValueError, match=r"has no argument `cache` or `past_key_values`"):
        other.generate(ids, **GREEDY, locality_dial=0.5)


@torch.no_grad()
def test_keys_that_our_cache_does_not_know_of_are_refused(make_model, make_text) -> None:
    """As those of a cache under a name that no version of ours knows."""
    model, ids = make_model(**LOCAL), make_text(1, 20)
    cache = DynamicCache()
    model(ids, past_key_values=cache)

    def hidden(module, args, kwargs):
        return args, kwargs | {model._cache_argument: cache}

    hooks = [layer.attn.register_forward_pre_hook(hidden, with_kwargs=True) for layer in model.transformer.h]
    with pytest.raises(ValueError, match=r"attends to 40 keys in layer 0, where the text and its cache have 20 tokens"):
        model(ids, locality_dial=0.5, use_cache=False)
    for hook in hooks:
        hook.remove()


def test_another_cache_than_the_prepared_one_is_refused(make_model, make_text) -> None:
    model = make_model(**LOCAL)

    def swap(module, args, outputs):
        outputs[model._cache_argument] = DynamicCache()
        return outputs

    model.transformer.register_forward_hook(swap)
    with pytest.raises(ValueError, match="LocalistGPT2LMHeadModel has filled another cache than the one that it was"):
        model(make_text(1, 20), locality_dial=0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("position_bias", torch.zeros(1)), ("indices", torch.zeros(1)), ("relative_bias", torch.zeros(1))],
)
def test_arguments_that_reach_the_attention_and_are_not_known_are_refused(make_model, make_text, name, value) -> None:
    model, ids = make_model(**LOCAL), make_text(1, 20)
    for request in ({"locality_dial": 0.5}, {"output_fidelity": [3]}):
        with pytest.raises(ValueError, match=rf"`{name}` reaches the attention of layer . \(GPT2Attention\)"):
            model(ids, **request, **{name: value})
        model(ids, **request, **{name: None})


def test_documents_that_flash_attention_is_told_of_must_be_those_of_the_positions(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL), make_text(1, 20)
    packed = {"position_ids": torch.cat((torch.arange(8), torch.arange(12)))[None], "use_cache": False}
    starts, others = torch.tensor([0, 8, 20], dtype=torch.int32), torch.tensor([0, 9, 20], dtype=torch.int32)
    index, other_index = (torch.arange(20)[None] >= first for first in (8, 9))
    told = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 12, "seq_idx": index.int()}
    wrong = {"cu_seq_lens_q": others, "cu_seq_lens_k": others, "seq_idx": other_index.int()}
    for request in ({"locality_dial": 0.5}, {"output_fidelity": [3]}):
        assert torch.equal(model(ids, **packed, **told, **request).logits, model(ids, **packed, **request).logits)
        for name, value in wrong.items():
            with pytest.raises(ValueError, match=f"`{name}` has documents start elsewhere than `position_ids`"):
                model(ids, **packed, **{**told, name: value}, **request)
        with pytest.raises(ValueError, match="`cu_seq_lens_q` has documents start elsewhere"):
            model(ids, **told, **request)  # nothing tells them apart


def test_attention_that_is_not_causal_is_refused(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL), make_text(1, 20)
    for request in ({"locality_dial": 0.5}, {"output_fidelity": [3]}):
        model(ids, **request, is_causal=True)
        with pytest.raises(ValueError, match="`is_causal` is False; locality is of attention to the tokens before"):
            model(ids, **request, is_causal=False)
    model.config.is_causal = False
    with pytest.raises(ValueError, match=r"`config\.is_causal` is False"):
        model(ids, locality_dial=0.5)


@pytest.mark.parametrize("request_", [{"locality_dial": 0.5}, {"locality_dial": 1.0}, {"output_fidelity": True}])
@torch.no_grad()
def test_positions_of_one_text_without_a_mask_are_no_packed_documents(make_model, make_text, request_) -> None:
    model, ids = make_model(**LOCAL), make_text(2, 30)
    for first, use_cache in ((0, True), (0, None), (5, True)):
        position = torch.arange(first, first + 30)[None]
        whole = model(ids, position_ids=position, **request_)
        prompt = model(ids[:, :20], position_ids=position[:, :20], use_cache=use_cache, **request_)
        step = model(ids[:, 20:], position_ids=position[:, 20:], past_key_values=cache_of(prompt), **request_)
        assert_close(step.logits, whole.logits[:, 20:], atol=1e-5, rtol=0)


def test_a_cache_of_packed_documents_is_refused_where_it_is_asked_for(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL), make_text(1, 30)
    position = torch.cat((torch.arange(12), torch.arange(18)))[None]
    for request in ({"locality_dial": 0.5}, {"output_fidelity": True}):
        with pytest.raises(ValueError, match=r"`position_ids` start anew.*Pass `use_cache=False`"):
            model(ids, position_ids=position, use_cache=True, **request)
        outputs = model(ids, position_ids=position, **request)
        assert cache_of(outputs) is None
        alone = model(ids[:, 12:], use_cache=False, **request)
        assert_close(outputs.logits[:, 12:], alone.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("request_", [{"locality_dial": 0.5}, {"min_fidelity": 0.8}, {"output_fidelity": True}])
@torch.no_grad()
def test_a_row_with_padding_on_its_left_is_what_it_is_alone(make_model, make_text, request_) -> None:
    """Its positions too, which GPT-2 has learned: nobody need tell them."""
    model, ids = make_model(**LOCAL, num_sink_tokens=1), make_text(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    outputs = model(ids, attention_mask=mask, **request_)
    alone = model(ids[:1, 11:], **request_)
    assert_close(outputs.logits[:1, 11:], alone.logits, atol=1e-5, rtol=0)
    if outputs.get("block_share"):
        for layer in range(4):
            assert_close(outputs.block_share[layer][:1, :, 11:], alone.block_share[layer], atol=1e-5, rtol=0)
    prompt = model(ids[:, :20], attention_mask=mask[:, :20], **request_)
    step = model(ids[:, 20:], attention_mask=mask, past_key_values=cache_of(prompt), **request_)
    assert_close(step.logits, outputs.logits[:, 20:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("request_", [{"locality_dial": 0.5}, {"locality_dial": 1.0}, {"min_fidelity": 0.5}])
def test_attention_dropout_under_the_dial_is_refused(make_model, make_text, request_) -> None:
    model, ids = make_model(**LOCAL, attn_pdrop=0.1), make_text(1, 20)
    model(ids, **request_)  # there is none in evaluation
    model.train()(ids, output_fidelity=True)
    with pytest.raises(ValueError, match=r"attention dropout of layer 0 is 0\.1; under the dial it must be 0"):
        model(ids, **request_)


def test_early_exit_is_refused_before_anything_is_changed(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL), make_text(1, 20)
    free = model.generate(ids, **GREEDY)
    for request in ({"locality_dial": 0.5}, {"min_fidelity": 0.5}):
        with pytest.raises(ValueError, match=r"`assistant_early_exit` is 2; under `locality_dial`"):
            model.generate(ids, **GREEDY, assistant_early_exit=2, **request)
    model.generation_config.assistant_early_exit = 2
    for config in (None, GenerationConfig(**GREEDY)):
        with pytest.raises(ValueError, match=r"`assistant_early_exit` is 2"):
            model.generate(ids, config, locality_dial=0.5)
    model.generation_config.assistant_early_exit = None
    assert model.config.num_hidden_layers == 4
    assert torch.equal(model.generate(ids, **GREEDY), free)


def test_what_a_generation_config_leaves_open_is_the_models(make_model, make_text) -> None:
    model, ids = make_model(**LOCAL), make_text(1, 20)
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, **GREEDY, locality_dial=1.0)
    model.generation_config.prompt_lookup_num_tokens = 3  # tokens are then taken back out of the cache
    assert torch.equal(model.generate(ids, GenerationConfig(**GREEDY), locality_dial=1.0), expected)


def test_models_made_of_one_configuration_have_dials_of_their_own(make_config, make_text) -> None:
    config, ids = make_config(**LOCAL), make_text(1, 20)
    one, other = LocalistGPT2LMHeadModel(config).eval(), LocalistGPT2LMHeadModel(config).eval()
    free = other(ids).logits
    with one.set_locality_dial(1.0):
        assert torch.equal(other(ids).logits, free)
    one.config.locality_dial = 1.0
    assert torch.equal(other(ids).logits, free)
