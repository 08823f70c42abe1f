"""Pairs -> log-probs of a policy and its reference -> the DPO loss."""

import argparse

from notus.data.dataset import TokenizedDataset
from notus.data.tokenize import load_pairs
from notus.evaluation.preferences.scores import Scoring, score_model
from notus.evaluation.resolve_model import find_source
from notus.losses import dpo_loss
from notus.model.export import load_tokenizer
from notus.runtime.distributed import process_group

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("policy", metavar="POLICY", help="the folder of a run, a model or an adapter, or a hub id")
parser.add_argument("reference", metavar="REFERENCE", help="the same for the model that it started from")
parser.add_argument("pairs", metavar="PAIRS", help="a file of prompt, chosen, rejected; docs/data.md has the formats")
args = parser.parse_args()

policy, reference = find_source(args.policy), find_source(args.reference)
tokenizer = load_tokenizer(policy.folder, trust_remote_code=False)
dataset, report = load_pairs(args.pairs, tokenizer, max_length=1024, max_prompt_length=512)
rows = TokenizedDataset(dataset)
with process_group() as device:  # under torchrun, the ranks share the models and the work
    scoring = Scoring(rows, tokenizer, precision="fp32", device=device)
    policy_logps, reference_logps = (score_model(model, scoring).pairs for model in (policy, reference))
# each [n, 2]: chosen, rejected; nats, summed over the completion's tokens
losses, chosen, rejected = dpo_loss(*policy_logps.unbind(1), *reference_logps.unbind(1), beta=0.1)
print(report)
print(f"loss {losses.mean():.4f}  accuracy {(chosen > rejected).float().mean():.1%}")
