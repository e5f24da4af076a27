"""Named settings of curation: the paper's sets, and Marbles."""
