"""Measure how well contents find their products: the same as `mmrec evaluate`.

python index/evaluate_matching.py --encoder runs/demo/train/encoder --shards runs/demo/shards --out runs/demo
"""

import tyro

from mmrec.cli import evaluate, run_program

if __name__ == "__main__":
    run_program(lambda: tyro.cli(evaluate))
