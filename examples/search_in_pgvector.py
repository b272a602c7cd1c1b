"""Put an exported index into PostgreSQL with pgvector and search it there; needs a server with the extension.

pip install 'psycopg[binary]' pgvector
bt-adapter index export videos.index rows.parquet
python examples/search_in_pgvector.py rows.parquet "a dog catches a frisbee" --database postgresql://localhost/videos
"""

import argparse

import numpy as np
import psycopg
import pyarrow.parquet as pq
from pgvector.psycopg import register_vector

from bt_adapter_hf.search.encoding import VideoEncoder


parser = argparse.ArgumentParser()
parser.add_argument("rows")
parser.add_argument("text")
parser.add_argument("--database", required=True)
parser.add_argument("--model", help="the one that made the index (default: the one inside the package)")
args = parser.parse_args()

file = pq.ParquetFile(args.rows)
width = file.schema_arrow.field("vector").type.list_size
with psycopg.connect(args.database) as connection:
    connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    register_vector(connection)
    connection.execute(f"CREATE TABLE videos (path text, starts float8, ends float8, feature vector({width}))")
    for batch in file.iter_batches(1024):
        rows = [
            (row["path"], row["start"], row["end"], np.array(row["vector"], np.float32)) for row in batch.to_pylist()
        ]
        connection.cursor().executemany("INSERT INTO videos VALUES (%s, %s, %s, %s)", rows)
    connection.execute("CREATE INDEX ON videos USING hnsw (feature vector_cosine_ops)")
    query = VideoEncoder.from_pretrained(args.model).encode_texts([args.text])[0]
    nearest = "SELECT 1 - (feature <=> %s), path, starts, ends FROM videos ORDER BY feature <=> %s LIMIT 5"
    for score, path, start, end in connection.execute(nearest, (query, query)):
        print(f"{score:.4f}  {start:.1f}-{end:.1f}  {path}")
