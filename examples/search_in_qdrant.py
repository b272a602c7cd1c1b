"""Put an exported index into Qdrant and search it there; in memory here, a server's address works the same.

pip install qdrant-client
bt-adapter index export videos.index rows.parquet
python examples/search_in_qdrant.py rows.parquet "a dog catches a frisbee" --model org/my-model
"""

import argparse

import pyarrow.parquet as pq
from qdrant_client import QdrantClient, models

from bt_adapter_hf.search.encoding import VideoEncoder


parser = argparse.ArgumentParser()
parser.add_argument("rows")
parser.add_argument("text")
parser.add_argument("--model", help="the one that made the index (default: the one inside the package)")
parser.add_argument("--url", default=":memory:", help="of a Qdrant server")
args = parser.parse_args()

file = pq.ParquetFile(args.rows)
width = file.schema_arrow.field("vector").type.list_size
client = QdrantClient(args.url)
client.create_collection("videos", models.VectorParams(size=width, distance=models.Distance.COSINE))
number = 0
for batch in file.iter_batches(1024):
    points = []
    for row in batch.to_pylist():
        payload = {name: row[name] for name in ("path", "start", "end", "duration")}
        points.append(models.PointStruct(id=number, vector=row["vector"], payload=payload))
        number += 1
    client.upsert("videos", points)
query = VideoEncoder.from_pretrained(args.model).encode_texts([args.text])[0]
for hit in client.query_points("videos", query.tolist(), limit=5).points:
    print(f"{hit.score:.4f}  {hit.payload['start']:.1f}-{hit.payload['end']:.1f}  {hit.payload['path']}")
