"""transformers on torch: its model class, its loss, `generate`, and torch's fused AdamW."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM
from worker import Job, Run, serve


def _model(job: Job) -> torch.nn.Module:
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(
        job.checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.to(_device(job))


def _device(job: Job) -> str:
    return "cuda" if job.device == "gpu" else "cpu"


def train(job: Job) -> Run:
    model = _model(job).train()
    ids = torch.from_numpy(job.batch()).long().to(_device(job))
    # fused, as transformers' own Trainer has it
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=job.learning_rate, weight_decay=job.weight_decay, fused=True
    )

    def run() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def logprobs(job: Job) -> Run:
    model = _model(job).eval()
    ids = torch.from_numpy(job.batch()).long().to(_device(job))

    @torch.inference_mode()
    def run() -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].transpose(1, 2)
        return -torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").cpu()

    return run


def sample(job: Job) -> Run:
    model = _model(job).eval()
    model.generation_config.eos_token_id = None  # nothing ends an answer early
    prompts = torch.from_numpy(job.prompts()).long().to(_device(job))

    def run() -> torch.Tensor:
        ids = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=job.new,
            pad_token_id=0,
        )
        return ids[:, job.prompt :].cpu()

    return run


if __name__ == "__main__":
    serve({"train": train, "logprobs": logprobs, "sample": sample}, ("transformers", "torch"))
