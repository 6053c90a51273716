"""`python -m hf_paged` is the `hf-paged` command."""

from hf_paged.cli import main

main()
