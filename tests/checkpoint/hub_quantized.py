"""config.json of quantized models on the hub: those of ``hub_configs`` with their ``quantization_config``."""

from tests.checkpoint.hub_configs import CONFIGS
from tests.checkpoint.hub_families import Values

MXFP4 = {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    "quant_method": "mxfp4",
}  # fmt: skip
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
QUANTIZED: dict[str, Values] = {  # as their makers publish them, and not served
    "gpt-oss-20b": CONFIGS["gpt-oss-20b"] | {"quantization_config": MXFP4},
    "gpt-oss-120b": CONFIGS["gpt-oss-120b"] | {"quantization_config": MXFP4},
    "DeepSeek-V3.1": CONFIGS["DeepSeek-V3"] | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
}
SERVED_QUANTIZED: dict[str, Values] = {  # with the keys that the tools of their makers write
    "DeepSeek-V3": CONFIGS["DeepSeek-V3"] | {"quantization_config": FP8},
    "Qwen2.5-0.5B-Instruct-AWQ": CONFIGS["Qwen2.5-0.5B"]
    | {
        "quantization_config": {
            "bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
            "zero_point": True,
        }
    },
    "Qwen2.5-0.5B-Instruct-GPTQ-Int4": CONFIGS["Qwen2.5-0.5B"]
    | {
        "quantization_config": {
            "batch_size": 1, "bits": 4, "block_name_to_quantize": None, "cache_block_outputs": True,
            "damp_percent": 0.01, "dataset": None, "desc_act": False, "exllama_config": {"version": 1},
            "group_size": 128, "max_input_length": None, "model_seqlen": None,
            "module_name_preceding_first_block": None, "modules_in_block_to_quantize": None, "pad_token_id": None,
            "quant_method": "gptq", "sym": True, "tokenizer": None, "true_sequential": True, "use_cuda_fp16": False,
            "use_exllama": True,
        }
    },
    "Llama-3.1-8B-Instruct-quantized.w8a8": CONFIGS["Llama-3.1-8B-Instruct"]
    | {
        "quantization_config": {
            "config_groups": {
                "group_0": {
                    "input_activations": {
                        "block_structure": None, "dynamic": True, "group_size": None, "num_bits": 8,
                        "observer": "memoryless", "observer_kwargs": {}, "strategy": "token", "symmetric": True,
                        "type": "int",
                    },
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {
                        "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
                        "observer": "mse", "observer_kwargs": {}, "strategy": "channel", "symmetric": True,
                        "type": "int",
                    },
                }
            },
            "format": "int-quantized", "global_compression_ratio": 1.2, "ignore": ["lm_head"],
            "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "frozen",
        }
    },
}  # fmt: skip
