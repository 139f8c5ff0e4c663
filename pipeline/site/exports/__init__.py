"""The atlas in other people's formats, so that their viewers open it."""

from pipeline.site.exports.embedding_atlas import export_embedding_atlas
from pipeline.site.exports.graphs import export_attribution_graph, export_gexf, export_graphml
from pipeline.site.exports.neuronpedia import export_bulk, export_upload_batches

__all__ = [
    "export_attribution_graph",
    "export_bulk",
    "export_embedding_atlas",
    "export_gexf",
    "export_graphml",
    "export_upload_batches",
]
