"""A slow plain version of the tokens that a recommender with user and context features reads: one history, one token
at a time."""

import torch


def tokens(items, values, kinds, user=(), contexts=None):
    """Vectors [L, D] of one history without padding, and the place that each next item is predicted from.

    `items`: [S, D]; `values`: [1 + values, D], row 0 unused; `kinds`: one per column of the user, then the contexts';
    `user`: numbers; `contexts`: a list of numbers per item, of the interaction after it.
    """

    def value(number):
        return values[number] if number else torch.zeros_like(values[0])

    read, places = [], []
    for column, number in enumerate(user):
        read.append(value(number) + kinds[column])
    for step, item in enumerate(items):
        read.append(item)
        if contexts is not None:
            read.append(sum((value(number) for number in contexts[step]), kinds[-1]))
        places.append(len(read) - 1)
    return torch.stack(read), places


def scores(model, history, user=(), contexts=None):
    """[S, V]: of one history of item numbers, every item's score after each of its items."""
    side, table = model.side_features, model.item_embeddings()
    read, places = tokens(table[history], side.values.weight, side.kinds.weight, user, contexts)
    states = model.model(inputs_embeds=read[None]).last_hidden_state[0]
    return torch.stack([torch.stack([torch.dot(states[place], item) for item in table]) for place in places])
