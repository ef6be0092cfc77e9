"""Negatives of all ranks: collectives with gradients, and losses and bounds of the batch that all ranks hold together.

Nothing here knows a trainer. The functions take a process group of torch.distributed, gloo or NCCL.

    group.py        which ranks take part
    agreement.py    what they must agree on, and mistakes of one of them that all are told
    collectives.py  rows gathered and sums taken over ranks, with gradients
    ring.py         keys, and their gradients, that travel around the ranks
    streaming.py    statistics and gradients of a rank's own rows of scores, a block of columns at a time
    columns.py      options of columns, for the columns of all ranks
    infonce.py      the InfoNCE loss
    siglip.py       the sigmoid loss
    bounds.py       the nine bounds, of embeddings, of stored scores and of concat critics

Gradients are those of the sum of all ranks' results. DDP averages over ranks: parameters then have the gradient of one
process on the joined batch.
"""
