"""Which kinds of patterns do heads have, and are the heads of a kind important?

The ViT visual-analytics method (arXiv 2303.13731): a convolutional autoencoder learns codes of the patterns of all heads in all
sequences, t-SNE draws the codes in two dimensions, clusters of codes are kinds of patterns, and kinds are compared by the
importance of their heads, which comes from elsewhere (leave-one-head-out, ablation). Here patterns are pooled to one size
first, each is divided by its largest weight, and the autoencoder is small: two convolutions of stride 2, one dense layer to the
code, and the same back.

Clusters are found in anything. Beside the silhouette of the codes stands that of shuffled labels; beside the autoencoder,
principal components of the same number, with the same clustering and their own reconstruction error. Where PCA is as good,
nothing is gained by the autoencoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.catalogue import Analysis
from workbench.probes.similarity.patterns import HeadPatterns, head_patterns, planted_heads, scaled
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

EMBEDDINGS = ("tsne", "pca")


@dataclass(frozen=True)
class HeadClusters(Result):
    """``codes`` ``[N, D]`` and ``components`` ``[N, D]`` (PCA), ``embedding`` ``[N, 2]``, ``cluster`` ``[N]`` (-1: no cluster) of
    the N patterns. ``silhouette``: of the codes by their clusters, -1 to 1; ``silhouette_shuffled``: mean over shuffled labels;
    ``silhouette_pca``: of the components by clusters of their own. ``error`` and ``error_pca``: share of the patterns' variance
    that is not reconstructed. ``importance`` ``[N]``: of each pattern's head, NaN where none was given."""

    codes: Tensor
    components: Tensor
    embedding: Tensor
    cluster: Tensor
    silhouette: float
    silhouette_shuffled: float
    silhouette_pca: float
    error: float
    error_pca: float
    importance: Tensor
    sequence: tuple[int, ...]
    layer: tuple[int | str, ...]
    head: tuple[int, ...]
    embedded_by: str
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per pattern: ``sequence, layer, head, cluster, x, y, importance``."""
        import pandas as pd

        return pd.DataFrame(
            {
                "sequence": self.sequence,
                "layer": self.layer,
                "head": self.head,
                "cluster": self.cluster.numpy(),
                "x": self.embedding[:, 0].numpy(),
                "y": self.embedding[:, 1].numpy(),
                "importance": self.importance.numpy(),
            }
        )

    def clusters(self) -> pd.DataFrame:
        """One row per cluster: ``cluster, patterns, heads`` (how many), ``mean_importance``."""
        table = self.frame()
        table["name"] = [f"{layer}-{head}" for layer, head in zip(self.layer, self.head, strict=True)]
        grouped = table.groupby("cluster")
        found = grouped.agg(
            patterns=("head", "size"), heads=("name", "nunique"), mean_importance=("importance", "mean")
        )
        return found.reset_index()

    def connection(self, draws: int = 999, seed: int = 0) -> tuple[float, float, float]:
        """How much of the importance the kind of pattern explains: the share of the variance of importance over heads that lies
        between clusters (a head counts for the cluster of most of its patterns), its mean if importances are shuffled over heads,
        and the share of shuffles with as much (p). NaN without importances of three heads or more."""
        label, value = self._by_head()
        known = ~value.isnan()
        label, value = label[known], value[known]
        if len(value) < 3 or float(value.var()) == 0:
            return float("nan"), float("nan"), float("nan")
        member = nn.functional.one_hot(label - label.min()).double()
        generator = torch.Generator().manual_seed(seed)
        orders = torch.stack([torch.randperm(len(value), generator=generator) for _ in range(draws)])
        values = torch.cat([value[None], value[orders]]) - value.mean()
        size = member.sum(0)
        between = ((values @ member).square() / size.clamp(min=1)).sum(1) / values.square().sum(1)
        p = (1 + int((between[1:] >= between[0] - 1e-12).sum())) / (draws + 1)
        return float(between[0]), float(between[1:].mean()), p

    def separation(self, labels: Sequence[Any]) -> tuple[float, float]:
        """Silhouette of the codes and of the principal components by labels from elsewhere, such as known families of heads."""
        if len(labels) != len(self.codes):
            raise WorkbenchError(f"a label per pattern, {len(self.codes)}; got {len(labels)}")
        places = torch.tensor([sorted(set(map(str, labels))).index(str(label)) for label in labels])
        return _silhouette(self.codes, places), _silhouette(self.components, places)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The embedding, a colour per cluster; heads of known importance are drawn larger the more important they are."""
        ax = axis(ax, 5.0, 4.2)
        known = self.importance.nan_to_num(0.0).abs()
        sizes = 18 + 80 * known / known.max().clamp(min=1e-300)
        for label in sorted(set(self.cluster.tolist())):
            here = self.cluster == label
            colour = "0.7" if label < 0 else f"C{label % 10}"
            name = "no cluster" if label < 0 else f"cluster {label}"
            x, y = self.embedding[here].T.numpy()
            ax.scatter(x, y, s=sizes[here].numpy(), color=colour, label=name)
        ax.legend(fontsize=7)
        title = f"Patterns of heads, silhouette {self.silhouette:.2f}\n{self.provenance.model}"
        ax.set(xlabel=f"{self.embedded_by} 1", ylabel=f"{self.embedded_by} 2", title=title)
        return ax

    def _by_head(self) -> tuple[Tensor, Tensor]:
        found: dict[tuple[int | str, int], list[int]] = {}
        for n, key in enumerate(zip(self.layer, self.head, strict=True)):
            found.setdefault(key, []).append(n)
        label = torch.stack([self.cluster[rows].mode().values for rows in found.values()])
        return label, torch.stack([self.importance[rows[0]] for rows in found.values()])


def cluster_heads(
    patterns: HeadPatterns,
    clusters: int | None = None,
    *,
    importance: Mapping[tuple[int | str, int], float] | None = None,
    code: int = 8,
    steps: int = 300,
    embedding: str = "tsne",
    seed: int = 0,
) -> HeadClusters:
    """Codes, clusters and a picture of the patterns of heads.

    ``clusters``: so many by k-means; None: as many as HDBSCAN finds (patterns in no dense place get -1). ``importance``: a
    number per ``(layer, head)``, to be connected with the clusters. ``code``: numbers per pattern; ``steps``: of training, on
    64 patterns at a time, on the CPU, the same for the same ``seed``. ``embedding``: ``tsne`` or ``pca``, of the codes.
    Refuses fewer than 8 patterns, and equal ones. With fewer than two clusters, or as many as patterns, silhouettes are NaN.
    """
    from sklearn.decomposition import PCA

    n = len(patterns.patterns)
    if embedding not in EMBEDDINGS:
        raise UnknownName("embedding", embedding, EMBEDDINGS)
    if n < 8:
        raise Refused(f"an autoencoder of {n} patterns learns nothing: give 8 or more, from more heads or sequences")
    if clusters is not None and not 2 <= clusters < n:
        raise WorkbenchError(f"clusters lie between 2 and the {n} patterns less one; got {clusters}")
    if code < 2 or steps < 1:
        raise WorkbenchError(f"a code of at least 2 numbers, at least 1 step; got code={code}, steps={steps}")
    images = scaled(patterns.patterns).float()
    if bool((images == images[0]).all()):
        raise Refused("all patterns are equal: there is nothing to tell apart")
    codes, rebuilt = _autoencoder(images, code, steps, seed)
    flat = images.flatten(1).double()
    known = min(code, n - 1, flat.shape[1])
    pca = PCA(known, svd_solver="full").fit(flat.numpy())
    components = torch.from_numpy(pca.transform(flat.numpy()))
    spread = float((flat - flat.mean(0)).square().sum())
    labels, others = (_labels(x, clusters, seed) for x in (codes, components))
    generator = torch.Generator().manual_seed(seed)
    mixed = [_silhouette(codes, labels[torch.randperm(n, generator=generator)]) for _ in range(20)]
    given = importance or {}
    heads = zip(patterns.layer, patterns.head, strict=True)
    undefined = {}
    if len(set(labels.tolist()) - {-1}) < 2:
        undefined["silhouette"] = "fewer than two clusters were found; ask for a number of clusters"
    return HeadClusters(
        codes=codes,
        components=components,
        embedding=_embedded(codes, embedding, seed),
        cluster=labels,
        silhouette=_silhouette(codes, labels),
        silhouette_shuffled=float(torch.tensor(mixed).mean()),
        silhouette_pca=_silhouette(components, others),
        error=float((flat - rebuilt).square().sum()) / spread,
        error_pca=float((flat - torch.from_numpy(pca.inverse_transform(components.numpy()))).square().sum()) / spread,
        importance=torch.tensor([float(given.get(key, float("nan"))) for key in heads], dtype=torch.float64),
        sequence=patterns.sequence,
        layer=patterns.layer,
        head=patterns.head,
        embedded_by=embedding,
        undefined=undefined,
        provenance=patterns.provenance,
    )


class _Net(nn.Module):
    def __init__(self, side: int, code: int) -> None:
        super().__init__()
        rounded = -(-side // 4)
        self.encode = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * rounded * rounded, code),
        )
        self.decode = nn.Sequential(
            nn.Linear(code, 16 * rounded * rounded),
            nn.ReLU(),
            nn.Unflatten(1, (16, rounded, rounded)),
            nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
        )
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images[:, None]))[:, 0, : self.side, : self.side]


def _autoencoder(images: Tensor, code: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes ``[N, code]`` and flat reconstructions ``[N, side * side]`` in float64."""
    n = len(images)
    batch = min(64, n)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = _Net(images.shape[1], code)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        order: list[Tensor] = []
        for _ in range(steps):
            order = order or list(torch.randperm(n).split(batch))
            rows = order.pop()
            loss = (net(images[rows]) - images[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return net.encode(images[:, None]).double(), net(images).flatten(1).double()


def _labels(codes: Tensor, clusters: int | None, seed: int) -> Tensor:
    if clusters is None:
        from sklearn.cluster import HDBSCAN

        return torch.from_numpy(
            HDBSCAN(min_cluster_size=max(2, len(codes) // 20), copy=True).fit_predict(codes.numpy())
        )
    from sklearn.cluster import KMeans

    return torch.from_numpy(KMeans(clusters, n_init=10, random_state=seed).fit_predict(codes.numpy())).long()


def _silhouette(codes: Tensor, labels: Tensor) -> float:
    from sklearn.metrics import silhouette_score

    inside = labels >= 0
    kinds = len(set(labels[inside].tolist()))
    if not 2 <= kinds < int(inside.sum()):
        return float("nan")
    return float(silhouette_score(codes[inside].numpy(), labels[inside].numpy()))


def _embedded(codes: Tensor, by: str, seed: int) -> Tensor:
    if by == "pca":
        from sklearn.decomposition import PCA

        return torch.from_numpy(PCA(2, svd_solver="full").fit_transform(codes.numpy()))
    from sklearn.manifold import TSNE

    near = min(30.0, (len(codes) - 1) / 3)
    found = TSNE(
        2, perplexity=near, init="pca", random_state=seed, method="exact" if len(codes) < 200 else "barnes_hut"
    )
    return torch.from_numpy(found.fit_transform(codes.numpy())).double()


ANALYSES = (
    Analysis(
        name="head-clusters",
        question="Which kinds of patterns do heads have, and are the heads of a kind important?",
        function=cluster_heads,
        example=lambda: {
            "patterns": head_patterns(planted_heads(grid=4, copies=2)[0], side=16),
            "clusters": 6,
            "steps": 30,
            "embedding": "pca",
        },
        paper="ViT visual analytics 2023 (arXiv 2303.13731), abstract",
        source="tensors",
        null="silhouette of shuffled labels; principal components instead of the autoencoder",
        cause="probes.ablation.ablation_curve gives importances to connect",
        definition="Size and training of the autoencoder, k-means or HDBSCAN, and the measures of quality are ours.",
    ),
)
