"""Put an exported index into Milvus and search it there; in a file by Milvus Lite, a server's address works the same.

pip install 'pymilvus[milvus-lite]'
bt-adapter index export videos.index rows.parquet
python examples/search_in_milvus.py rows.parquet "a dog catches a frisbee" --model org/my-model
"""

import argparse

import pyarrow.parquet as pq
from pymilvus import MilvusClient

from bt_adapter_hf.search.encoding import VideoEncoder


parser = argparse.ArgumentParser()
parser.add_argument("rows")
parser.add_argument("text")
parser.add_argument("--model", help="the one that made the index (default: the one inside the package)")
parser.add_argument("--uri", default="videos-milvus.db", help="a file, or the address of a server")
args = parser.parse_args()

file = pq.ParquetFile(args.rows)
width = file.schema_arrow.field("vector").type.list_size
client = MilvusClient(args.uri)
if client.has_collection("videos"):
    client.drop_collection("videos")
client.create_collection("videos", dimension=width, metric_type="COSINE", auto_id=True)
for batch in file.iter_batches(1024):
    rows = [{name: row[name] for name in ("vector", "path", "start", "end")} for row in batch.to_pylist()]
    client.insert("videos", rows)
query = VideoEncoder.from_pretrained(args.model).encode_texts([args.text])[0]
(hits,) = client.search("videos", [query.tolist()], limit=5, output_fields=["path", "start", "end"])
for hit in hits:
    print(f"{hit['distance']:.4f}  {hit['entity']['start']:.1f}-{hit['entity']['end']:.1f}  {hit['entity']['path']}")
