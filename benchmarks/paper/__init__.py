"""The figures of the PagedAttention paper (Kwon et al., SOSP 2023, arXiv 2309.06180), computed again with cupaged's own
scheduler and block manager. `python -m paper`, run in benchmarks/, writes docs/paper.md."""
