"""Several processes that run one sharded model together: what they tell each other, and what they add up."""
