//! The index of one tar file, and what its label members say.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::split::Class;
use crate::error::{Error, Result};

/// Label members beyond this are not labels.
const MAX_LABEL: u64 = 1 << 20;
const BLOCK: u64 = 512;

/// A regular file in a tar file: an image or a possible label.
pub(super) struct Member {
    pub path: String,
    pub offset: u64,
    pub length: u64,
    pub is_image: bool,
    /// Whether what follows the first dot of the base name is a bare image extension.
    pub extension_is_whole: bool,
    /// The content of a .cls, .txt or .json member.
    pub text: Option<String>,
}

impl Member {
    fn new(path: String, offset: u64, length: u64) -> Self {
        let mut member =
            Self { path, offset, length, is_image: false, extension_is_whole: false, text: None };
        member.is_image = super::is_image_name(member.base());
        member.extension_is_whole = super::is_image_extension(member.extension());
        member
    }

    fn base(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or("")
    }

    /// The path up to the first dot of the base name: what the members of one sample share.
    pub fn key(&self) -> &str {
        let base = self.base();
        &self.path[..self.path.len() - base.len() + base.find('.').unwrap_or(base.len())]
    }

    /// What follows the first dot of the base name.
    pub fn extension(&self) -> &str {
        self.path.get(self.key().len() + 1..).unwrap_or("")
    }

    /// The folders above the file.
    pub fn folders(&self) -> Vec<&str> {
        let mut parts: Vec<&str> = self.path.split('/').filter(|p| !p.is_empty() && *p != ".").collect();
        parts.pop();
        parts
    }
}

/// The path of a member without the extension after its last dot.
pub(super) fn stem(path: &str) -> &str {
    path.rsplit_once('.').map_or(path, |(stem, _)| stem)
}

/// The path of a text without its extension; `None` of another member.
pub(super) fn caption_stem(path: &str) -> Option<&str> {
    path.strip_suffix(".txt")
}

/// Reads the headers of a tar file and the label members. With `captions`, `.txt` members are no labels and stay where they
/// are. A cut file is an error that names the byte.
pub(super) fn index(path: &Path, captions: bool) -> Result<Vec<Member>> {
    let unreadable = |e: std::io::Error| Error::file(path, format!("the tar file cannot be read ({e})"));
    let mut file = File::open(path).map_err(unreadable)?;
    let length = file.metadata().map_err(unreadable)?.len();
    let mut magic = [0; 2];
    if length >= 2 {
        file.read_exact(&mut magic).map_err(unreadable)?;
    }
    if magic == [0x1F, 0x8B] {
        return Err(Error::file(
            path,
            "this is gzip data, which allows no random access; unpack it to a plain .tar",
        ));
    }
    let mut archive = ::tar::Archive::new(File::open(path).map_err(unreadable)?);
    let mut members = Vec::new();
    // Where the member read last ends, padding included.
    let mut end = 0;
    let cut = |at: u64, what: &str| {
        Error::file(
            path,
            format!(
                "the tar file is cut at byte {length}: {what} at byte {at} is incomplete; copy or \
                 fetch the shard again"
            ),
        )
    };
    for entry in archive.entries_with_seek().map_err(unreadable)? {
        let mut entry = entry.map_err(|e| {
            if length < end + 2 * BLOCK {
                cut(end, "the header")
            } else {
                Error::file(
                    path,
                    format!(
                        "there is no valid tar header behind byte {end} ({e}); copy or fetch the shard again"
                    ),
                )
            }
        })?;
        let kind = entry.header().entry_type();
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let (start, size) = (entry.raw_file_position(), entry.size());
        let stored =
            if kind.is_gnu_sparse() { entry.header().entry_size().map_err(unreadable)? } else { size };
        end = start.saturating_add(stored).saturating_add(BLOCK - 1) / BLOCK * BLOCK;
        if end > length {
            return Err(cut(start, &format!("member {name}")));
        }
        let base = name.rsplit('/').next().unwrap_or("");
        if kind.is_dir() || base.is_empty() || base.starts_with('.') {
            continue;
        }
        let mut member = Member::new(name, start, size);
        if !kind.is_file() && !kind.is_contiguous() {
            if member.is_image {
                return Err(Error::file(
                    path,
                    format!(
                        "member {} is a link or a sparse file; pack the set again with `tar \
                         --hard-dereference --dereference`",
                        member.path
                    ),
                ));
            }
            continue;
        }
        let is_caption = captions && caption_stem(&member.path).is_some();
        if !is_caption && matches!(member.extension(), "cls" | "txt" | "json") && size <= MAX_LABEL {
            let mut text = Vec::new();
            entry.read_to_end(&mut text).map_err(unreadable)?;
            member.text = Some(String::from_utf8_lossy(&text).into_owned());
        }
        if member.is_image || is_caption || member.text.is_some() {
            members.push(member);
        }
    }
    // The end of an archive is marked by a block of zeros.
    if length < end + BLOCK {
        return Err(cut(end, "the end-of-archive mark"));
    }
    Ok(members)
}

/// The class that a label member states.
pub(super) fn class_of(shard: &Path, member: &Member) -> Result<Class> {
    let text = member.text.as_deref().unwrap_or("").trim();
    let bad = |what: &str| {
        let start: String = text.chars().take(40).collect();
        Error::file(shard, format!("member {} holds `{start}` where {what} was expected", member.path))
    };
    match member.extension() {
        "cls" => text.parse().map(Class::Number).map_err(|_| bad("a class number from 0")),
        "json" => json_class(text)
            .unwrap_or_else(|| Err(bad("a label")))
            .map_err(|_| bad("a label that is a number from 0 or a name")),
        _ if text.is_empty() => Err(bad("a class name")),
        _ => Ok(Class::Name(text.to_string())),
    }
}

/// The class in a JSON member: `label`, `class` or `cls`. `None` where none of them is there.
pub(super) fn json_class(text: &str) -> Option<Result<Class>> {
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    let label = ["label", "class", "cls"].iter().find_map(|key| value.get(key))?;
    Some(match label {
        serde_json::Value::String(name) if !name.trim().is_empty() => {
            Ok(Class::Name(name.trim().to_string()))
        }
        other => match other.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) => Ok(Class::Number(n)),
            None => Err(Error::usage(format!("`{other}` is no label"))),
        },
    })
}
