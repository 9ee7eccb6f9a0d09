"""Build an index from embeddings: the same as `mmrec index build`.

python index/build_index.py --embeddings runs/demo/embeddings --out runs/demo/index
"""

import tyro

from mmrec.cli import index_build, run_program

if __name__ == "__main__":
    run_program(lambda: tyro.cli(index_build))
