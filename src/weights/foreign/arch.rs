//! Architectures by the names that their weights are published under: what their files do not tell.

use crate::recipe::shapes::{Dimensions, nearest};
use crate::{Error, Result};

const TEXT: &str = include_str!("tables/architectures.txt");

/// A published architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arch {
    /// The name, such as `vit_base_patch16_224`.
    pub name: &'static str,
    /// Keys of the tables whose names its files may have.
    tables: &'static str,
    /// Model width D.
    pub width: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads.
    pub heads: usize,
    /// Side of the images that it was trained with, in pixels.
    pub resolution: usize,
    words: &'static str,
}

/// All of them.
pub fn all() -> impl Iterator<Item = Arch> {
    TEXT.lines().filter_map(read)
}

fn read(line: &'static str) -> Option<Arch> {
    let (mut rest, mut words) = (line.split('#').next()?.trim(), [""; 6]);
    for word in &mut words {
        let (first, after) = rest.split_once(' ').unwrap_or((rest, ""));
        (*word, rest) = (first, after.trim());
    }
    let [name, tables, width, depth, heads, resolution] = words;
    let number = |text: &str| text.parse().ok();
    Some(Arch {
        name,
        tables,
        width: number(width)?,
        depth: number(depth)?,
        heads: number(heads)?,
        resolution: number(resolution)?,
        words: rest,
    })
}

impl Arch {
    /// The architecture `name`; a tag of weights (`.augreg_in1k`) is left aside.
    ///
    /// # Errors
    /// An unknown name, with the nearest known ones.
    pub fn named(name: &str) -> Result<Self> {
        let plain = name.split('.').next().unwrap_or_default();
        if let Some(arch) = all().find(|arch| arch.name == name || arch.name == plain) {
            return Ok(arch);
        }
        let mut names: Vec<&str> = all().map(|arch| arch.name).collect();
        let mut near = Vec::new();
        while near.len() < 3
            && let Some(found) = nearest(plain, names.iter().copied())
        {
            near.push(found);
            names.retain(|name| *name != found);
        }
        if near.is_empty() && !plain.is_empty() {
            // The beginning of a name, perhaps.
            near.extend(names.iter().filter(|name| name.contains(plain)).take(3));
        }
        let hint = if near.is_empty() { String::new() } else { format!("; near it are {}", near.join(", ")) };
        Err(Error::usage(format!(
            "--arch {name}: there is no architecture of that name{hint}; `trencadis convert --list` names all"
        )))
    }

    /// Its settings, `key=value`, for [`Recipe::with_sets`](crate::recipe::Recipe::with_sets).
    pub fn settings(&self) -> Vec<String> {
        let mut sets = vec![
            "model.shape=".to_owned(),
            format!("model.width={}", self.width),
            format!("model.depth={}", self.depth),
            format!("model.heads={}", self.heads),
        ];
        for word in self.words.split_whitespace() {
            let (mean, std) = match word {
                "half" => ("[0.5]", "[0.5]"),
                "imagenet" => ("[0.485, 0.456, 0.406]", "[0.229, 0.224, 0.225]"),
                "unit" => ("[0.0]", "[1.0]"),
                set => {
                    sets.push(set.to_owned());
                    continue;
                }
            };
            sets.extend([format!("data.mean={mean}"), format!("data.std={std}")]);
        }
        sets
    }

    /// Refuses weights of another architecture. `table` is the table of their names.
    ///
    /// # Errors
    /// What differs.
    pub fn check(&self, table: &str, implementation: &str, dims: &Dimensions) -> Result<()> {
        if !self.tables.split(',').any(|known| known == table) {
            return Err(Error::usage(format!(
                "--arch {}: the file has the names of {implementation}, under which that architecture is not published; \
                 `trencadis convert --list` names all",
                self.name
            )));
        }
        if (dims.width, dims.depth, dims.heads) == (self.width, self.depth, self.heads) {
            return Ok(());
        }
        Err(Error::usage(format!(
            "--arch {} has width {}, {} blocks and {} heads, the file width {}, {} blocks and {} heads{}",
            self.name,
            self.width,
            self.depth,
            self.heads,
            dims.width,
            dims.depth,
            dims.heads,
            hint(table, dims.width, dims.depth)
        )))
    }
}

/// The first architectures whose files have names of `table` and these sizes, as an advice.
pub(super) fn hint(table: &str, width: usize, depth: usize) -> String {
    const SHOWN: usize = 3;
    let fits = |arch: &Arch| {
        arch.tables.split(',').any(|known| known == table) && (arch.width, arch.depth) == (width, depth)
    };
    let names: Vec<&str> = all().filter(fits).map(|arch| arch.name).take(SHOWN).collect();
    if names.is_empty() { String::new() } else { format!("; of its sizes are {}", names.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;
    use crate::weights::foreign::table::family;

    #[test]
    fn all_can_be_read_and_set() {
        let lines = TEXT.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')).count();
        assert_eq!(all().count(), lines);
        for arch in all() {
            assert!(arch.tables.split(',').all(|key| family(key).is_ok()), "{}", arch.name);
            let model = Recipe::default().with_sets(&arch.settings()).unwrap().model;
            let dims = Recipe { model: crate::recipe::ModelConfig { mlp: 1, ..model }, ..Recipe::default() };
            let dims = dims.model.dimensions().unwrap();
            assert_eq!(
                (dims.width, dims.depth, dims.heads),
                (arch.width, arch.depth, arch.heads),
                "{}",
                arch.name
            );
            arch.check(arch.tables.split(',').next().unwrap(), "", &dims).unwrap();
        }
    }

    #[test]
    fn names() {
        assert_eq!(Arch::named("vit_base_patch16_224.augreg_in21k").unwrap().heads, 12);
        assert_eq!(Arch::named("google/siglip2-so400m-patch16-naflex").unwrap().width, 1152);
        let error = Arch::named("vit_bas_patch16_224").unwrap_err().to_string();
        assert!(error.contains("near it are vit_base_patch16_224"), "{error}");
        assert!(
            Arch::named("siglip2-base").unwrap_err().to_string().contains("google/siglip2-base-patch32-256")
        );
        assert!(!Arch::named("resnet50").unwrap_err().to_string().contains("near it"));
        let deit = Arch::named("deit3_small_patch16_224").unwrap();
        let dims = Dimensions { width: 384, depth: 12, mlp: 1536, heads: 12, kv_heads: 12, head_dim: 32 };
        let error = deit.check("timm-vit", "timm", &dims).unwrap_err().to_string();
        assert!(error.contains("6 heads, the file width 384, 12 blocks and 12 heads"), "{error}");
        assert!(
            deit.check("hf-vit", "transformers' ViT", &dims)
                .unwrap_err()
                .to_string()
                .contains("transformers' ViT")
        );
    }
}
