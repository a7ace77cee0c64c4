"""The figures of the PagedAttention paper (Kwon et al., SOSP 2023, arXiv 2309.06180), computed again with cupaged's own
scheduler and block manager. See docs/paper.md, which `python -m paper` beside it writes."""
