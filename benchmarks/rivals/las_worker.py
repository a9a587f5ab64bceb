"""Run LAS's BERT and the stock one on rows of tokens, in turn; `las_bert` starts it in LAS's environment.

python las_worker.py MODEL ROWS OUTPUT      (in a checkout of LAS, which reads its tables from ./weight)
"""

import json
import sys
import time

import torch


sys.path.insert(0, ".")

import bert_SNN_LAS
from transformers import AutoModelForSequenceClassification


@torch.inference_mode()
def timed(model, row):
    start = time.process_time()
    logits = model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long)).logits
    return time.process_time() - start, logits[0].tolist()


def main(folder, rows, output):
    torch.set_num_threads(1)
    with open(rows) as file:
        tokens = json.load(file)
    models = {
        "LAS": bert_SNN_LAS.SNNAutoModelForSequenceClassification.from_pretrained(folder).eval(),
        "stock": AutoModelForSequenceClassification.from_pretrained(folder).eval(),
    }
    for model in models.values():
        timed(model, tokens[0])
    found = {name: {"logits": [], "seconds": 0.0} for name in models}
    for row in tokens:
        for name, model in models.items():
            seconds, logits = timed(model, row)
            found[name]["logits"].append(logits)
            found[name]["seconds"] += seconds
    with open(output, "w") as file:
        json.dump(found, file)


main(*sys.argv[1:])
