"""`python -m kvmesh`: the same as the `kvmesh` command."""

from kvmesh.cli import main

if __name__ == "__main__":
    main()
