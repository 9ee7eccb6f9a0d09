"""`python -m mmrec`, and with several processes `accelerate launch -m mmrec embed ...`."""

from mmrec.cli import main

if __name__ == "__main__":
    main()
