"""What stands between the tower and the language model in GIF question answering.

Letters in shape comments: G groups of frames, N states of the tower per group, D their width, Q queries, W width of
the language model.
"""

import torch
from torch import nn
from transformers import Blip2QFormerModel

from .configuration_bt_adapter_gif_qa import BTAdapterGifQAConfig


class MlpConnector(nn.Module):
    """Two layers on each state by itself, as in LLaVA: (G, N, D) -> (G, N, W)."""

    def __init__(self, config: BTAdapterGifQAConfig):
        super().__init__()
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        self.linear_1, self.act, self.linear_2 = nn.Linear(width, out), nn.GELU(), nn.Linear(out, out)

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(states)))


class AttentionConnector(nn.Module):
    """Learned queries attend to the states: (G, N, D) -> (G, Q, W)."""

    def __init__(self, config: BTAdapterGifQAConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, max(1, width // 64), batch_first=True)
        self.projection = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`mask` bool (G, N): True = a state of a real frame."""
        queries, states = self.query_tokens.expand(len(states), -1, -1), self.norm(states)
        left_out = None if mask is None else ~mask
        pooled, _ = self.attention(queries, states, states, key_padding_mask=left_out, need_weights=False)
        return self.projection(pooled + queries)


class QFormerConnector(nn.Module):
    """BLIP-2's Q-Former: (G, N, D) -> (G, Q, W)."""

    def __init__(self, config: BTAdapterGifQAConfig):
        super().__init__()
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        width = config.qformer_config.hidden_size
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, width))
        self.projection = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`mask` bool (G, N): True = a state of a real frame."""
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        read = self.qformer(
            query_embeds=self.query_tokens.expand(len(states), -1, -1),
            encoder_hidden_states=states,
            encoder_attention_mask=mask.long(),
            return_dict=True,
        )
        return self.projection(read.last_hidden_state)


CONNECTORS = {"mlp": MlpConnector, "attention": AttentionConnector, "qformer": QFormerConnector}
