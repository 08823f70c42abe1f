"""Pairs -> log-probs of a policy and its reference -> the DPO loss: `score_pairs.py POLICY REFERENCE PAIRS`."""

import sys

from notus.data.dataset import TokenizedDataset
from notus.data.tokenize import load_pairs
from notus.evaluation.preferences.scores import Scoring, score_model
from notus.evaluation.resolve_model import find_source
from notus.losses import dpo_loss
from notus.model.export import load_tokenizer
from notus.runtime.distributed import process_group

policy, reference = (find_source(name) for name in sys.argv[1:3])  # folders of runs, models or adapters, or hub ids
tokenizer = load_tokenizer(policy.folder, trust_remote_code=False)
dataset, report = load_pairs(sys.argv[3], tokenizer, max_length=1024, max_prompt_length=512)
rows = TokenizedDataset(dataset)
with process_group() as device:  # under torchrun, the ranks share the models and the work
    scoring = Scoring(rows, tokenizer, precision="fp32", device=device)
    policy_logps, reference_logps = (score_model(model, scoring).pairs for model in (policy, reference))
# each [n, 2]: chosen, rejected; nats, summed over the completion's tokens
losses, chosen, rejected = dpo_loss(*policy_logps.unbind(1), *reference_logps.unbind(1), beta=0.1)
print(report)
print(f"loss {losses.mean():.4f}  accuracy {(chosen > rejected).float().mean():.1%}")
