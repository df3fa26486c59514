"""One map's block of the Gauss-Newton Hessian from labels drawn from the model, with and without what tokens share.

With G_z = Σ_t g_t a_tᵀ the gradient of a document z at drawn labels, E over draws, N documents:

    together  H v = (1/N) Σ_z E[⟨G_z, v⟩ G_z]                       the map's whole block, up to the sampling
    apart     H v = (1/N) Σ_z Σ_t E[⟨g_t a_tᵀ, v⟩ g_t a_tᵀ]        its tokens taken as independent

`apart` is what K-FAC's factors are made of before activations are taken as independent of gradients, so that between
`together` and `apart` lies the covariance between tokens alone: same labels, same positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msif_ray.corpus.windows import Encoded
from msif_ray.influence.capture import Capture
from msif_ray.influence.labels import batch_uniforms
from msif_ray.validate.problem import Problem
from msif_ray.validate.setting import batches


@dataclass(frozen=True)
class TokenVectors:
    """What every position of some documents contributes to a map's gradient: `activations` `[positions, columns]`, the
    `gradients` `[draws, positions, out]` of so many labels drawn, and `owners` `[positions]`, whose each is."""

    activations: Tensor
    gradients: Tensor
    owners: Tensor
    documents: int

    def invert_apart(self, damping: float, vectors: Tensor) -> Tensor:
        """(H + c)⁻¹ v with tokens as independent, of no more ranks than there are positions and draws (Woodbury): the
        product of two g aᵀ is (g·g)(a·a), so none is made."""
        scale = len(self.gradients) * self.documents
        gradients = self.gradients.flatten(0, 1).double()
        activations = self.activations.double().repeat(len(self.gradients), 1)
        small = (gradients @ gradients.T).mul_(activations @ activations.T) / scale
        small.diagonal().add_(damping)
        wide = vectors.double()
        inside = ((gradients @ wide) * activations).sum(2).T / scale
        weights = torch.linalg.solve(small, inside)  # [positions · draws, queries]
        outside = torch.stack([(each[:, None] * gradients).T @ activations for each in weights.T])
        return ((wide - outside) / damping).to(vectors.dtype)

    @property
    def whole(self) -> Tensor:
        """The gradient of every document under every draw, `[draws · documents, out · columns]`."""
        out, columns = self.gradients.shape[-1], self.activations.shape[1]
        found = self.activations.new_zeros(len(self.gradients), self.documents, out, columns)
        for document in range(self.documents):
            own = self.owners == document
            found[:, document] = self.gradients[:, own].transpose(1, 2) @ self.activations[own]
        return found.flatten(0, 1).flatten(1)

    def invert_together(self, damping: float, vectors: Tensor) -> Tensor:
        """(H + c)⁻¹ v with H of whole documents, which has no more ranks than there are gradients (Woodbury)."""
        roots = self.whole / (len(self.gradients) * self.documents) ** 0.5
        small = (roots @ roots.T).double() + damping * torch.eye(len(roots), dtype=torch.float64)
        flat = vectors.flatten(1)
        inside = torch.linalg.solve(small, (roots @ flat.T).double()).to(flat.dtype)
        return ((flat - inside.T @ roots) / damping).reshape(vectors.shape)


def token_vectors(problem: Problem, name: str, documents: Sequence[Encoded], draws: int, seed: int) -> TokenVectors:
    """Those of one map; positions that carry no gradient under any draw are left out."""
    places = {document.document_id: place for place, document in enumerate(documents)}
    activations, gradients, owners = [], [], []
    with Capture(problem.setting.model, {name: problem.setting.maps[name]}) as capture:
        for batch in batches(list(documents), problem.tokens_per_batch):
            mask = batch.attention_mask
            drawn = []
            for draw in range(draws):
                captured = capture.run(batch, batch_uniforms(seed + draw, "validate", batch))
                drawn.append(captured.gradients(name)[mask])
            activations.append(captured.activations(name)[mask])
            gradients.append(torch.stack(drawn))
            rows = torch.tensor([places[key.document_id] for key in batch.keys])
            owners.append(rows[:, None].expand(mask.shape)[mask])
    return TokenVectors(torch.cat(activations), torch.cat(gradients, dim=1), torch.cat(owners), len(documents))
