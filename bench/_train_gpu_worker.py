"""One contestant of ``bench.train_gpu``: ``python -m bench._train_gpu_worker CONTESTANT [quick]``.

It prints one line that starts with ``@@``: its figures as JSON.
"""

import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHAPE: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
QUICK_SHAPE = {**SHAPE, "num_hidden_layers": 4}
CONTESTANTS = ("ours", "trl best", "trl default", "unsloth")
ROWS_A_STEP, N_STEPS, N_WARM = 64, 10, 2
RANK, ALPHA, RATE = 16, 32.0, 2e-4
FIRST_ID = 1000


def lengths_and_prompts(n_rows: int) -> list[tuple[int, int]]:
    """Return for each row its ids and how many of them are its prompt's."""
    draw = np.random.default_rng(7)
    lengths = np.clip(draw.lognormal(np.log(100), 0.5, n_rows), 50, 310).astype(int)
    return [(int(n), max(8, int(n * 0.41))) for n in lengths]


def make_rows() -> list[tuple[list[int], int]]:
    draw = np.random.default_rng(11)
    return [
        (draw.integers(FIRST_ID, 40_000, n).tolist(), n_prompt)
        for n, n_prompt in lengths_and_prompts(ROWS_A_STEP * N_STEPS)
    ]


def build_plain_base(shape: dict[str, Any]) -> Any:
    """Return a random model in bfloat16 on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape)
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model: Any = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False).eval()


def build_base(shape: dict[str, Any]) -> Any:
    """Return a random model on the GPU, its linear layers but the head in NF4."""
    import bitsandbytes as bnb
    from transformers.quantizers.auto import AutoHfQuantizer

    model = build_plain_base(shape)
    for path, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or path == "lm_head":
            continue
        packed = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        weight = module.weight.data.cpu()
        packed.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        model.set_submodule(path, packed.to("cuda"))
        del module
    gc.collect()
    torch.cuda.empty_cache()
    model.is_loaded_in_4bit = True
    model.is_quantized = True
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization(), pre_quantized=True)
    model.quantization_method = model.hf_quantizer.quantization_config.quant_method
    return model.requires_grad_(False).eval()


class Meter:
    """Times steps on a quiet device and prints one line of figures at the end."""

    def __init__(self, n_tokens: list[int]) -> None:
        self._n_tokens = n_tokens
        self._started = 0.0
        self._rates: list[float] = []
        self._losses: list[float] = []

    def begin(self) -> None:
        torch.cuda.synchronize()
        self._started = time.perf_counter()

    def end(self, loss: float) -> None:
        torch.cuda.synchronize()
        took = time.perf_counter() - self._started
        self._rates.append(self._n_tokens[len(self._rates)] / took)
        self._losses.append(loss)

    def print(self) -> None:
        figures = {
            "tokens_per_second": statistics.median(self._rates[N_WARM:]),
            "rates": [round(rate) for rate in self._rates],
            "losses": [round(loss, 4) for loss in self._losses],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
        sys.__stdout__.write(f"@@{json.dumps(figures)}\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]


def run_ours(shape: dict[str, Any]) -> None:
    from models.domain.training import TrainingSpec
    from worker.training import methods, objectives
    from worker.training.forward import choose_forward
    from worker.training.loop import Trainer
    from worker.training.model import adapt
    from worker.training.objectives.base import Example
    from worker.training.task import Task

    rows = make_rows()
    spec = TrainingSpec.model_validate(
        {
            "model": "base",
            "training_file": "rows",
            "seed": 7,
            "hyperparameters": {
                "n_epochs": 1,
                "batch_size": ROWS_A_STEP,
                "learning_rate_multiplier": 1.0,
            },
            "objective": {"type": "sft"},
            "peft": {"type": "lora", "r": RANK, "alpha": ALPHA, "dropout": 0.0},
            "precision": {"type": "nf4"},
            "optimizer": {"learning_rate": RATE, "schedule": "constant", "warmup_ratio": 0.0},
            "checkpoint_steps": 1_000_000,
        }
    )
    params = methods.parse_params(spec.peft)
    method = methods.get_method("lora")
    model = adapt(build_base(shape), method, params, 7)
    forward, reason = choose_forward(model, spec.precision, "cuda:0", 2, cache_weights=False)
    if reason is not None:
        raise SystemExit(reason)
    examples = [
        Example(line, np.array(ids, np.int32), np.arange(len(ids)) >= start, len(ids) - start)
        for line, (ids, start) in enumerate(rows, 1)
    ]
    task = Task(
        model=model,
        forward=forward,
        method=method,
        method_params=params,
        objective=objectives.get_objective("sft"),
        objective_params=objectives.parse_params(spec.objective),
        spec=spec,
        train=examples,
        valid=(),
        device="cuda:0",
    )
    trainer = Trainer(task, warn=lambda text: None)
    batches = in_order(len(rows))
    trainer._batches = lambda epoch: batches  # type: ignore[assignment]
    trainer._probe_memory()
    meter = Meter(tokens_of(rows))
    for _ in range(N_STEPS):
        meter.begin()
        meter.end(trainer.step().train_loss)
    meter.print()


def in_order(n_rows: int) -> list[list[int]]:
    return [list(range(at, at + ROWS_A_STEP)) for at in range(0, n_rows, ROWS_A_STEP)]


def tokens_of(rows: list[tuple[list[int], int]]) -> list[int]:
    return [sum(len(rows[row][0]) for row in batch) for batch in in_order(len(rows))]


def dataset(rows: list[tuple[list[int], int]], *, grouped: bool) -> Any:
    """Return the rows as TRL takes them; `grouped` orders those of a step by length."""
    from datasets import Dataset

    order = [
        row
        for batch in in_order(len(rows))
        for row in (sorted(batch, key=lambda row: -len(rows[row][0])) if grouped else batch)
    ]
    return Dataset.from_list(
        [
            {
                "input_ids": rows[row][0],
                "labels": [-100] * rows[row][1] + rows[row][0][rows[row][1] :],
                "completion_mask": [0] * rows[row][1] + [1] * (len(rows[row][0]) - rows[row][1]),
            }
            for row in order
        ]
    )


def unsloth_model(shape: dict[str, Any], directory: Path) -> tuple[Any, Any]:
    """Return the same base with adapters, and its tokenizer, as Unsloth loads them."""
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    base = build_base(shape)
    save_quantised(base, make_tokenizer(), directory)
    del base
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(directory), max_seq_length=2048, load_in_4bit=True, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=int(ALPHA),
        lora_dropout=0.0,
        target_modules=PROJECTIONS,
        use_gradient_checkpointing=False,
    )
    return model, tokenizer


def run_trl(shape: dict[str, Any], *, best: bool, unsloth: bool = False) -> None:
    """TRL's SFTTrainer on ids; `best` orders the rows of a step by length."""
    if unsloth:
        import unsloth as _  # noqa: F401 - it changes what is imported after it
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = make_rows()
    meter = Meter(tokens_of(rows))

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            meter.begin()

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                meter.end(float(logs["loss"]))

    class Ordered(SFTTrainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        if unsloth:
            peft_config: Any = None
            model, tokenizer = unsloth_model(shape, Path(name))
        else:
            peft_config = LoraConfig(
                r=RANK,
                lora_alpha=int(ALPHA),
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
            model, tokenizer = build_base(shape), make_tokenizer()
        a_pass = 16 if best else 8
        checkpointing: dict[str, Any] = {"gradient_checkpointing": False} if best else {}
        options = SFTConfig(
            output_dir=name,
            per_device_train_batch_size=a_pass,
            gradient_accumulation_steps=ROWS_A_STEP // a_pass,
            max_steps=N_STEPS,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            warmup_steps=0,
            logging_steps=1,
            bf16=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            **checkpointing,
        )
        trainer = Ordered(
            model=model,
            args=options,
            train_dataset=dataset(rows, grouped=best),
            processing_class=tokenizer,
            callbacks=[Turns()],
            peft_config=peft_config,
        )
        trainer.train()
    meter.print()


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def quantization() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def save_quantised(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write the packed weights as ``save_pretrained`` of a model that was loaded in NF4 does."""
    from safetensors.torch import save_file

    tensors = {name: each.contiguous() for name, each in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["quantization_config"] = quantization().to_dict()
    config["architectures"], config["torch_dtype"] = ["LlamaForCausalLM"], "bfloat16"
    (directory / "config.json").write_text(json.dumps(config, default=str))
    tokenizer.save_pretrained(directory)


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(4)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
        bos_token="w0",
        eos_token="w1",
        pad_token="w2",
        unk_token="w3",
    )


def contend(name: str, shape: dict[str, Any]) -> None:
    sys.stdout = sys.stderr
    match name:
        case "ours":
            run_ours(shape)
        case "unsloth":
            run_trl(shape, best=True, unsloth=True)
        case "trl best" | "trl default":
            run_trl(shape, best=name == "trl best")
        case _:
            raise SystemExit(f"There is no contestant {name!r}.")


if __name__ == "__main__":
    contend(sys.argv[1], QUICK_SHAPE if "quick" in sys.argv[2:] else SHAPE)
