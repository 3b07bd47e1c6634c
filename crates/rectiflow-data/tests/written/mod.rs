//! Sources of every kind for tests, written as the tools write them: pictures whose pixels are a
//! number, tars, their indexes, Parquet and MDS.

#![allow(dead_code, reason = "each user needs its own part")]

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
    sync::Arc,
};

use parquet::{
    data_type::{ByteArray, ByteArrayType},
    file::{
        properties::WriterProperties,
        writer::{SerializedFileWriter, SerializedRowGroupWriter},
    },
    schema::parser::parse_message_type,
};
use serde_json::{Value, json};

/// A PNG of 4 x 2 pixels, of which the first eight bytes are `id`.
pub(crate) fn picture(id: u64) -> Vec<u8> {
    let mut pixels = [0; 24];
    pixels[..8].copy_from_slice(&id.to_le_bytes());
    png(4, 2, &pixels)
}

/// A PNG of `side` x `side` pixels that no other `id` has.
pub(crate) fn large_picture(id: u64, side: u32) -> Vec<u8> {
    let mut pixels = Vec::new();
    for at in 0..u64::from(side * side) {
        let value = (at / 7 + id.wrapping_mul(at / 97 + 1)) as u8;
        pixels.extend([value, (at % 251) as u8, id as u8]);
    }
    png(side, side, &pixels)
}

fn png(width: u32, height: u32, pixels: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_compression(png::Compression::Fast);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(pixels).unwrap();
    writer.finish().unwrap();
    bytes
}

/// The number in the pixels of a picture.
pub(crate) fn id_of(bytes: &[u8]) -> u64 {
    let pixels = image::load_from_memory(bytes).unwrap().to_rgb8().into_raw();
    u64::from_le_bytes(pixels[..8].try_into().unwrap())
}

/// A member of a tar.
pub(crate) type Member = (String, Vec<u8>);

/// Writes a tar. Long names become GNU's, as in `tar` itself.
pub(crate) fn write_tar(path: &Path, members: impl IntoIterator<Item = Member>) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut tar = tar::Builder::new(BufWriter::new(File::create(path).unwrap()));
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    tar.into_inner().unwrap().flush().unwrap();
}

/// Writes the index beside a tar: as deepghs with `size`, as webshart with `length`.
pub(crate) fn write_index(tar: &Path, size_key: &str) {
    let mut files = serde_json::Map::new();
    let mut archive = tar::Archive::new(File::open(tar).unwrap());
    for entry in archive.entries_with_seek().unwrap() {
        let entry = entry.unwrap();
        let name = entry.path().unwrap().to_string_lossy().into_owned();
        let place = json!({"offset": entry.raw_file_position(), size_key: entry.size()});
        files.insert(name, place);
    }
    let len = fs::metadata(tar).unwrap().len();
    let index = json!({"filesize": len, "files": files});
    fs::write(tar.with_extension("json"), index.to_string()).unwrap();
}

/// A row of Parquet or MDS: a picture, its path, a text.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) bytes: Option<Vec<u8>>,
    pub(crate) path: Option<String>,
    pub(crate) text: Option<String>,
}

impl Row {
    pub(crate) fn new(bytes: Vec<u8>, text: &str) -> Self {
        Self {
            bytes: Some(bytes),
            path: None,
            text: Some(text.to_owned()),
        }
    }
}

/// Writes rows as `datasets` does: `image: struct{bytes, path}` and `text`, `group` rows a group.
pub(crate) fn write_parquet(path: &Path, rows: impl Iterator<Item = Row>, group: usize) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let schema = "message schema {
        optional group image { optional binary bytes; optional binary path (UTF8); }
        optional binary text (UTF8);
        optional int64 width;
    }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder()
        .set_write_batch_size(8)
        .set_data_page_row_count_limit(16)
        .build();
    let file = BufWriter::new(File::create(path).unwrap());
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
    let mut rows = rows.peekable();
    while rows.peek().is_some() {
        let rows: Vec<Row> = rows.by_ref().take(group).collect();
        let mut group = writer.next_row_group().unwrap();
        let bytes = |row: &Row| row.bytes.clone();
        let path = |row: &Row| row.path.clone().map(String::into_bytes);
        let text = |row: &Row| row.text.clone().map(String::into_bytes);
        write_column(&mut group, &rows, 2, &bytes);
        write_column(&mut group, &rows, 2, &path);
        write_column(&mut group, &rows, 1, &text);
        let mut column = group.next_column().unwrap().unwrap();
        let typed = column.typed::<parquet::data_type::Int64Type>();
        let levels = vec![1; rows.len()];
        typed
            .write_batch(&vec![4; rows.len()], Some(&levels), None)
            .unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

fn write_column<W: Write + Send>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    rows: &[Row],
    level: i16,
    value: &dyn Fn(&Row) -> Option<Vec<u8>>,
) {
    let mut values = Vec::new();
    let mut levels = Vec::new();
    for row in rows {
        let value = value(row);
        levels.push(if value.is_some() { level } else { level - 1 });
        values.extend(value.map(ByteArray::from));
    }
    let mut column = group.next_column().unwrap().unwrap();
    let typed = column.typed::<ByteArrayType>();
    typed.write_batch(&values, Some(&levels), None).unwrap();
    column.close().unwrap();
}

/// Writes MDS shards of `per_shard` rows with the columns `caption: str`, `image: png`, `n: int`.
pub(crate) fn write_mds(folder: &Path, rows: impl Iterator<Item = Row>, per_shard: usize) {
    fs::create_dir_all(folder).unwrap();
    let mut shards = Vec::new();
    let mut rows = rows.peekable();
    while rows.peek().is_some() {
        let rows: Vec<Row> = rows.by_ref().take(per_shard).collect();
        let name = format!("shard.{:05}.mds", shards.len());
        let bytes = mds_shard(&rows);
        fs::write(folder.join(&name), &bytes).unwrap();
        shards.push(json!({
            "column_encodings": ["str", "png", "int"], "column_names": ["caption", "image", "n"],
            "column_sizes": [null, null, 8], "compression": null, "format": "mds", "hashes": [],
            "raw_data": {"basename": name, "bytes": bytes.len(), "hashes": {}},
            "samples": rows.len(), "size_limit": 67_108_864, "version": 2, "zip_data": null,
        }));
    }
    let index: Value = json!({"shards": shards, "version": 2});
    fs::write(folder.join("index.json"), index.to_string()).unwrap();
}

fn mds_shard(rows: &[Row]) -> Vec<u8> {
    let config = br#"{"column_names": ["caption", "image", "n"]}"#;
    let mut samples: Vec<Vec<u8>> = Vec::new();
    for row in rows {
        let text = row.text.clone().unwrap_or_default();
        let bytes = row.bytes.clone().unwrap_or_default();
        let mut sample = Vec::new();
        for len in [text.len(), bytes.len()] {
            sample.extend((len as u32).to_le_bytes());
        }
        sample.extend(text.as_bytes());
        sample.extend(bytes);
        sample.extend(7_u64.to_le_bytes());
        samples.push(sample);
    }
    let mut shard = (rows.len() as u32).to_le_bytes().to_vec();
    let mut at = 4 * (rows.len() + 2) + config.len();
    shard.extend((at as u32).to_le_bytes());
    for sample in &samples {
        at += sample.len();
        shard.extend((at as u32).to_le_bytes());
    }
    shard.extend(config);
    shard.extend(samples.concat());
    shard
}
