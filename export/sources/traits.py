"""What a checkpoint says of itself, and what of it memedge exports: one table for every source.

Parity cannot notice a checkpoint that was trained in another way, or that its pipeline calls in another way: it
compares two copies of the same misreading. So the table allows, and does not forbid: fields and tensors that are known
pass, all others are refused or noted (check_traits.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OFF = (None, False)


@dataclass(frozen=True)
class Trait:
    """A field that says how a model was trained, or how it is called.

    Attributes:
        allowed: its values in models that memedge exports; of a list, all entries' values.
        meaning: what another value says, as the end of "so …".
    """

    allowed: tuple[Any, ...]
    meaning: str


@dataclass(frozen=True)
class Table:
    """The fields of one configuration file.

    Attributes:
        traits: fields with allowed values.
        known: fields of which any value will do: the libraries build the model by them, or samplers alone read them.
        strict: whether a field that nobody knows is refused; else it is noted, because the libraries leave it out.
    """

    traits: Mapping[str, Trait]
    known: frozenset[str]
    strict: bool


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CONDITION = "its UNet takes more than a prompt"
_BLOCKS = "its UNet is of blocks of another family"
_SIGMAS = "it was trained on noise levels of its own, and not on those of its betas"
_FLOW = "it was trained by flow matching"
_QUANTISED = Trait((None,), "its weights are quantised")

UNET = Table(
    traits={
        "class_embed_type": Trait((None,), _CONDITION),
        "num_class_embeds": Trait((None,), _CONDITION),
        "class_embeddings_concat": Trait(OFF, _CONDITION),
        "encoder_hid_dim": Trait((None,), _CONDITION),
        "encoder_hid_dim_type": Trait((None,), _CONDITION),
        "addition_embed_type": Trait((None, "text_time"), _CONDITION),
        "attention_type": Trait((None, "default"), _CONDITION),
        "dual_cross_attention": Trait(OFF, _CONDITION),
        "time_embedding_type": Trait((None, "positional"), "its UNet takes noise levels in place of timesteps"),
        "down_block_types": Trait(("CrossAttnDownBlock2D", "DownBlock2D"), _BLOCKS),
        "mid_block_type": Trait((None, "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"), _BLOCKS),
        "up_block_types": Trait(("CrossAttnUpBlock2D", "UpBlock2D"), _BLOCKS),
        "cross_attention_norm": Trait(OFF, _BLOCKS),
        "quantization_config": _QUANTISED,
    },
    known=_names(
        """
        _class_name _diffusers_version _name_or_path sample_size in_channels out_channels center_input_sample
        flip_sin_to_cos freq_shift only_cross_attention block_out_channels layers_per_block downsample_padding
        mid_block_scale_factor dropout act_fn norm_num_groups norm_eps cross_attention_dim transformer_layers_per_block
        reverse_transformer_layers_per_block attention_head_dim num_attention_heads use_linear_projection
        addition_time_embed_dim upcast_attention resnet_time_scale_shift resnet_skip_time_act resnet_out_scale_factor
        time_embedding_dim time_embedding_act_fn timestep_post_act conv_in_kernel conv_out_kernel
        projection_class_embeddings_input_dim mid_block_only_cross_attention addition_embed_type_num_heads
        time_cond_proj_dim
        decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup
        """  # the last line: what training scripts write of averaged weights
    ),
    strict=True,
)

# Schedulers whose noise is that of their betas, so that DDIM can be made of them. Those for few steps come with models
# that were distilled.
DISTILLED = ("LCMScheduler", "TCDScheduler")
SCHEDULERS = (
    "DDIMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
    *DISTILLED,
)
SCHEDULER = Table(
    traits={
        "prediction_type": Trait(("epsilon", "v_prediction"), "its UNet predicts neither noise nor velocities"),
        "predict_epsilon": Trait((None, True), "its UNet predicts no noise"),
        "variance_type": Trait(
            (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"), "its UNet predicts a variance"
        ),
        "timestep_type": Trait((None, "discrete"), "its UNet is given noise levels in place of timesteps"),
        "sigma_min": Trait((None,), _SIGMAS),
        "sigma_max": Trait((None,), _SIGMAS),
        "sigma_data": Trait((None,), _SIGMAS),
        "sigma_schedule": Trait((None,), _SIGMAS),
        "snr_shift_scale": Trait((None, 1), _SIGMAS),
        "use_flow_sigmas": Trait(OFF, _FLOW),
        "shift": Trait((None, 1), _FLOW),
        "use_dynamic_shifting": Trait(OFF, _FLOW),
        "shift_terminal": Trait((None,), _FLOW),
        "invert_sigmas": Trait(OFF, _FLOW),
        "stochastic_sampling": Trait(OFF, _FLOW),
    },
    known=_names(
        """
        _class_name _diffusers_version _name_or_path num_train_timesteps beta_start beta_end beta_schedule trained_betas
        rescale_betas_zero_snr steps_offset timestep_spacing set_alpha_to_one clip_sample clip_sample_range thresholding
        dynamic_thresholding_ratio sample_max_value skip_prk_steps tensor_format interpolation_type use_karras_sigmas
        use_exponential_sigmas use_beta_sigmas use_lu_lambdas algorithm_type solver_type solver_order solver_p
        lower_order_final euler_at_final final_sigmas_type lambda_min_clipped predict_x0 disable_corrector
        predictor_order corrector_order tau_func noise_sampler_seed original_inference_steps timestep_scaling
        flow_shift time_shift_type
        """
    ),
    strict=False,
)

_COMMON = _names("_class_name _diffusers_version _name_or_path")
TRANSFORMERS = {
    "SD3Transformer2DModel": Table(
        traits={"quantization_config": _QUANTISED},
        known=_COMMON
        | _names(
            """
            sample_size patch_size in_channels out_channels num_layers attention_head_dim num_attention_heads
            joint_attention_dim caption_projection_dim pooled_projection_dim pos_embed_max_size dual_attention_layers
            qk_norm
            """
        ),
        strict=True,
    ),
    "FluxTransformer2DModel": Table(
        traits={
            "patch_size": Trait((None, 1), "its pipeline packs latents in another way"),
            "quantization_config": _QUANTISED,
        },
        known=_COMMON
        | _names(
            """
            in_channels out_channels num_layers num_single_layers attention_head_dim num_attention_heads
            joint_attention_dim pooled_projection_dim guidance_embeds axes_dims_rope
            """
        ),
        strict=True,
    ),
}

_NOT_TEXT_TO_IMAGE = "it takes pictures besides the prompt"
TRANSFORMERS |= {
    "QwenImageTransformer2DModel": Table(
        traits={
            "guidance_embeds": Trait(OFF, "it is told a guidance scale"),
            "zero_cond_t": Trait(OFF, _NOT_TEXT_TO_IMAGE),
            "use_additional_t_cond": Trait(OFF, _NOT_TEXT_TO_IMAGE),
            "use_layer3d_rope": Trait(OFF, "it makes layers of pictures"),
            "patch_size": Trait((2,), "its tokens are of another size than its pipeline's"),
            "quantization_config": _QUANTISED,
        },
        known=_COMMON
        | _names(
            """
            in_channels out_channels num_layers attention_head_dim num_attention_heads joint_attention_dim
            axes_dims_rope pooled_projection_dim
            """  # the last one once was, and is not read
        ),
        strict=True,
    ),
    "ZImageTransformer2DModel": Table(
        traits={
            "siglip_feat_dim": Trait((None,), _NOT_TEXT_TO_IMAGE),
            "all_patch_size": Trait(((2,), [2]), "its tokens are of another size than its pipeline's"),
            "all_f_patch_size": Trait(((1,), [1]), "its tokens are of several pictures"),
            "quantization_config": _QUANTISED,
        },
        known=_COMMON
        | _names(
            """
            in_channels dim n_layers n_refiner_layers n_heads n_kv_heads norm_eps qk_norm cap_feat_dim rope_theta
            t_scale axes_dims axes_lens
            """
        ),
        strict=True,
    ),
}

# Schedulers whose noise levels are those of a flow from noise to pictures.
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)
FLOW_SCHEDULER = Table(
    traits={
        "num_train_timesteps": Trait((1000,), "its timesteps are not 1000 σ"),
        "invert_sigmas": Trait(OFF, "its σ run from pictures to noise"),
        "stochastic_sampling": Trait(OFF, "its sampler adds noise in each step"),
    },
    known=_COMMON
    | _names(
        """
        shift use_dynamic_shifting base_shift max_shift base_image_seq_len max_image_seq_len shift_terminal
        time_shift_type use_karras_sigmas use_exponential_sigmas use_beta_sigmas
        """
    ),
    strict=False,
)

CLIP_TEXT = Table(
    traits={
        "use_attention_mask": Trait(OFF, "its pipeline hides padding from the text encoder"),
        "quantization_config": _QUANTISED,
    },
    known=_names(
        """
        _name_or_path _commit_hash architectures model_type transformers_version torch_dtype dtype vocab_size
        hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads max_position_embeddings
        hidden_act layer_norm_eps attention_dropout dropout initializer_range initializer_factor pad_token_id
        bos_token_id eos_token_id gradient_checkpointing text_config text_config_dict vision_config vision_config_dict
        logit_scale_init_value
        return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss pruned_heads
        tie_word_embeddings chunk_size_feed_forward is_encoder_decoder is_decoder cross_attention_hidden_size
        add_cross_attention tie_encoder_decoder max_length min_length do_sample early_stopping num_beams
        num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
        no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
        return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
        exponential_decay_length_penalty suppress_tokens begin_suppress_tokens finetuning_task id2label label2id
        tokenizer_class prefix sep_token_id decoder_start_token_id task_specific_params problem_type use_cache
        """  # from return_dict on: what transformers once wrote for every model
    ),
    strict=False,
)

_OF_TEXT = {"quantization_config": _QUANTISED}
TEXT_ENCODERS = {
    "CLIPTextConfig": CLIP_TEXT,
    "T5Config": Table(
        traits=_OF_TEXT,
        known=CLIP_TEXT.known
        | _names(
            """
            d_model d_ff d_kv num_layers num_decoder_layers num_heads relative_attention_num_buckets
            relative_attention_max_distance dropout_rate layer_norm_epsilon feed_forward_proj dense_act_fn is_gated_act
            n_positions output_past classifier_dropout scale_decoder_outputs
            """
        ),
        strict=False,
    ),
}

_OF_QWEN = _OF_TEXT | {
    "use_sliding_window": Trait(OFF, "its tokens do not read all that stands before them"),
    "layer_types": Trait((None, "full_attention"), "its tokens do not read all that stands before them"),
}
_QWEN = CLIP_TEXT.known | _names(
    """
    num_key_value_heads rms_norm_eps rope_theta rope_scaling rope_parameters sliding_window max_window_layers head_dim
    attention_bias vision_start_token_id vision_end_token_id vision_token_id image_token_id video_token_id
    """
)
TEXT_ENCODERS |= {
    "Qwen2_5_VLConfig": Table(traits=_OF_QWEN, known=_QWEN, strict=False),
    "Qwen3Config": Table(traits=_OF_QWEN, known=_QWEN, strict=False),
}

# model_index.json, but for the components that a family has (check_traits.py).
PIPELINE = Table(
    traits={"requires_aesthetics_score": Trait(OFF, "it is a refiner, which continues images of another model")},
    known=_names(
        """
        _class_name _diffusers_version _name_or_path _commit_hash scheduler vae safety_checker feature_extractor
        image_encoder requires_safety_checker force_zeros_for_empty_prompt add_watermarker
        """
    ),
    strict=True,
)

# A single file's tensors. Its UNet and text encoders are counted elsewhere (single_file.py).
PARTS = (
    "model.diffusion_model.",
    "model_ema.",
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.embedders.0.",
    "conditioner.embedders.1.",
)
BUFFERS = _names(  # of the schedule that ldm and sgm computed, and a trainer's counters
    """
    betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
    log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
    posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 lvlb_weights logvar scale_factor
    denoiser.sigmas global_step epoch
    """
)
FOREIGN_TENSORS = {  # by how their names begin
    "edm_": "it was trained on EDM's noise levels, not on those of betas",
    "conditioner.": "it takes more conditions than a prompt",
    "control_model.": "it holds a ControlNet",
    "embedder.": "it takes the embedding of an image",
    "noise_augmentor.": "it takes the embedding of an image",
    "depth_model.": "it takes an image's depth",
    "low_scale_model.": "it takes a smaller image",
    "ip_adapter.": "it holds an IP-Adapter",
    "image_proj.": "it holds an IP-Adapter",
    "scaled_fp8": "its weights are quantised",
}
MARKERS: dict[str, tuple[str, Any]] = {  # tensors that say what the scheduler's configuration must say
    "v_pred": ("prediction_type", "v_prediction"),
    "ztsnr": ("rescale_betas_zero_snr", True),
}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}  # modelspec's words
LARGEST_MARKER = 16  # values; a tensor of more is a module's
