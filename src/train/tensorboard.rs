//! TensorBoard event files: scalars in protobuf messages, framed as TFRecords.
//!
//! A record is `u64 length, u32 crc(length), bytes, u32 crc(bytes)`, little-endian, with masked
//! CRC-32C. A record's bytes are an `Event` message (`event.proto` and `summary.proto` of
//! TensorBoard): `wall_time = 1` (double), `step = 2`, `file_version = 3`, `summary = 5`,
//! `session_log = 7`; a summary's `value = 1` holds `tag = 1` and `simple_value = 2` (float).

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Error, Result};

/// Appends scalars to an event file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts a new event file in `folder`; TensorBoard reads all of a folder's in the order of
    /// their names, which begin with the time. A run that resumes after `step` steps passes it, so that
    /// TensorBoard forgets what an earlier file holds of later steps; a new run passes 0.
    ///
    /// # Errors
    /// [`Error::Failure`] if the file cannot be written.
    pub fn create(folder: &Path, step: u64) -> Result<Self> {
        let seconds = now() as u64;
        let mut number = 0;
        let (path, file) = loop {
            let name = format!("events.out.tfevents.{seconds:010}.trencadis.{}.{number}", std::process::id());
            let path = folder.join(name);
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => break (path, file),
                Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(cause) => return Err(Error::io(&path, cause)),
            }
        };
        let mut writer = Self { path, file };
        writer.event(now(), 0, |event| bytes_field(event, 3, b"brain.Event:2"))?;
        if step > 0 {
            // SessionLog { status = START } at the first step to come.
            writer.event(now(), step + 1, |event| bytes_field(event, 7, &[0x08, 0x01]))?;
        }
        Ok(writer)
    }

    /// Writes `(tag, value)` pairs of a step, such as `("train/loss", 0.5)`.
    ///
    /// # Errors
    /// [`Error::Failure`] if they cannot be written.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        self.event(now(), step, |event| bytes_field(event, 5, &summary(values)))
    }

    fn event(&mut self, wall_time: f64, step: u64, what: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let mut event = vec![0x09];
        event.extend(wall_time.to_le_bytes());
        event.push(0x10);
        varint(&mut event, step);
        what(&mut event);
        self.file.write_all(&record(&event)).map_err(|cause| Error::io(&self.path, cause))
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

fn summary(values: &[(&str, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in values {
        let mut entry = Vec::new();
        bytes_field(&mut entry, 1, tag.as_bytes());
        entry.push(0x15);
        entry.extend((*value as f32).to_le_bytes());
        bytes_field(&mut summary, 1, &entry);
    }
    summary
}

/// A length-delimited field (wire type 2); `field` is below 16.
fn bytes_field(message: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    message.push(field << 3 | 2);
    varint(message, bytes.len() as u64);
    message.extend(bytes);
}

fn varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

fn record(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend(masked(&length).to_le_bytes());
    record.extend(bytes);
    record.extend(masked(bytes).to_le_bytes());
    record
}

/// TFRecord's mask: a CRC over data that holds CRCs would be weak.
fn masked(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), reflected polynomial 0x82f63b78.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut crc = i as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc: u32, &byte| crc >> 8 ^ TABLE[(crc as u8 ^ byte) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3720, B.4, and the check value of the CRC catalogue.
    #[test]
    fn crc_vectors() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
        assert_eq!(crc32c(&(0..32).rev().collect::<Vec<u8>>()), 0x113f_db5c);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn varints() {
        let encode = |value| {
            let mut bytes = Vec::new();
            varint(&mut bytes, value);
            bytes
        };
        assert_eq!(encode(0), [0]);
        assert_eq!(encode(127), [0x7f]);
        assert_eq!(encode(300), [0xac, 0x02]);
        assert_eq!(encode(u64::MAX).len(), 10);
    }

    /// Messages of a file, after checking every frame.
    fn messages(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let crc = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            let message = &bytes[12..12 + length];
            assert_eq!(crc(8), masked(&bytes[..8]));
            assert_eq!(crc(12 + length), masked(message));
            found.push(message.to_vec());
            bytes = &bytes[16 + length..];
        }
        found
    }

    #[test]
    fn a_file_parses_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), 299).unwrap();
        writer.scalars(300, &[("a", 1.5), ("bc", -2.0)]).unwrap();
        let found = messages(&std::fs::read(&writer.path).unwrap());
        assert_eq!(found.len(), 3);
        assert!(found.iter().all(|m| m[0] == 0x09));
        assert_eq!(found[0][9..], *b"\x10\x00\x1a\x0dbrain.Event:2");
        assert_eq!(found[1][9..], *b"\x10\xac\x02\x3a\x02\x08\x01");
        assert_eq!(
            found[2][9..],
            *b"\x10\xac\x02\x2a\x15\x0a\x08\x0a\x01a\x15\x00\x00\xc0\x3f\x0a\x09\x0a\x02bc\x15\x00\x00\x00\xc0"
        );
    }

    #[test]
    fn files_never_overwrite_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..3).map(|_| EventWriter::create(dir.path(), 0).unwrap().path).collect();
        assert!(paths[0] != paths[1] && paths[1] != paths[2] && paths[0] != paths[2]);
        assert!(EventWriter::create(&dir.path().join("absent"), 0).is_err());
    }
}
