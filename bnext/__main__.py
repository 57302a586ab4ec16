from bnext.cli import app as main

if __name__ == "__main__":
    main(prog_name="python -m bnext")
