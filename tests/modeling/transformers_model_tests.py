"""
Plain GPT-2 and the localist classes, each handed to transformers' own model tests.

Not collected here: `test_common.py` lays this file beside those tests, which transformers' sources hold.
"""

import unittest
from typing import ClassVar

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from localist_hf import LocalistGPT2Config, LocalistGPT2LMHeadModel, LocalistGPT2Model

from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_training_mixin import TrainingTesterMixin


# The tests know by these names which models have labels.
MODEL_MAPPING_NAMES["localist-gpt2"] = "LocalistGPT2Model"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["localist-gpt2"] = "LocalistGPT2LMHeadModel"


class ModelTester:
    """What the tests ask for a configuration and inputs."""

    batch_size, seq_length, encoder_seq_length, key_length = 13, 7, 7, 7
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 2
    is_training = True

    def __init__(self, config_class: type, base_model_class: type, causal_lm_class: type) -> None:
        self.config_class = config_class
        self.base_model_class = base_model_class
        self.causal_lm_class = causal_lm_class

    def get_config(self) -> GPT2Config:
        return self.config_class(
            vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_inner=37, bos_token_id=1, eos_token_id=2, pad_token_id=0
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[GPT2Config, dict[str, torch.Tensor]]:
        inputs = {"input_ids": ids_tensor([13, 7], 99), "token_type_ids": ids_tensor([13, 7], 16)}
        return self.get_config(), inputs


class CommonTests(ModelTesterMixin, TrainingTesterMixin):
    classes: ClassVar[tuple[type, ...]]
    test_missing_keys = False  # as for GPT-2 in transformers: a buffer less is no harm
    test_can_init_all_missing_weights_before_2023 = True  # skipped for GPT-2 by its age alone

    def setUp(self) -> None:
        config_class, *self.all_model_classes = self.classes
        self.model_tester = ModelTester(config_class, *self.all_model_classes)
        self.config_tester = ConfigTester(self, config_class=config_class, n_embd=37)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class PlainTest(CommonTests, unittest.TestCase):
    classes = (GPT2Config, GPT2Model, GPT2LMHeadModel)


class LocalistTest(CommonTests, unittest.TestCase):
    classes = (LocalistGPT2Config, LocalistGPT2Model, LocalistGPT2LMHeadModel)
