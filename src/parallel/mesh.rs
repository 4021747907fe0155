//! Two-dimensional meshes: the data axis shares out batches and optimiser state, the tensor axis layers.

use super::group::Group;
use crate::error::{Error, Result};

/// Ranks in rows of `tensor`: rank = data index · `tensor` + tensor index, so that the ranks that exchange the
/// most are neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    data: usize,
    tensor: usize,
}

impl Mesh {
    /// `world` ranks in rows of `tensor`.
    ///
    /// # Errors
    /// Where `tensor` does not divide `world`.
    pub fn new(world: usize, tensor: usize) -> Result<Self> {
        if tensor == 0 || world == 0 || !world.is_multiple_of(tensor) {
            return Err(Error::usage(format!(
                "{world} ranks are no mesh with a tensor axis of {tensor}; it must divide their number"
            )));
        }
        Ok(Self { data: world / tensor, tensor })
    }

    /// `data` rows of `tensor` ranks, which must be `world` in all.
    ///
    /// # Errors
    /// Where they are not.
    pub fn of(world: usize, data: usize, tensor: usize) -> Result<Self> {
        if data == 0 || tensor == 0 || data.checked_mul(tensor) != Some(world) {
            return Err(Error::usage(format!(
                "a mesh of {data} x {tensor} (data x tensor) does not match {world} ranks"
            )));
        }
        Ok(Self { data, tensor })
    }

    /// Length of the data axis.
    pub fn data(&self) -> usize {
        self.data
    }

    /// Length of the tensor axis.
    pub fn tensor(&self) -> usize {
        self.tensor
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.data * self.tensor
    }

    /// Data and tensor index of `rank`.
    pub fn coordinates(&self, rank: usize) -> (usize, usize) {
        (rank / self.tensor, rank % self.tensor)
    }

    /// The ranks that hold other parts of the layers for the batch of `rank`, itself included.
    pub fn tensor_ranks(&self, rank: usize) -> Vec<usize> {
        let first = rank - rank % self.tensor;
        (first..first + self.tensor).collect()
    }

    /// The ranks that hold the part of the layers that `rank` holds, for other batches, itself included.
    pub fn data_ranks(&self, rank: usize) -> Vec<usize> {
        (0..self.data).map(|row| row * self.tensor + rank % self.tensor).collect()
    }

    /// Whether every one of these counts, each with its name, can be shared out over the tensor axis.
    ///
    /// # Errors
    /// One message that lists all that cannot.
    pub fn check_divides(&self, counts: &[(&str, usize)]) -> Result<()> {
        check_divides(self.tensor, counts)
    }
}

/// Whether `parts` ranks can share every one of these counts evenly.
pub(crate) fn check_divides(parts: usize, counts: &[(&str, usize)]) -> Result<()> {
    let uneven: Vec<String> = counts
        .iter()
        .filter(|(_, count)| !count.is_multiple_of(parts))
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    if uneven.is_empty() {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{} cannot be shared evenly by {parts} ranks; choose a tensor axis that divides {}",
        uneven.join(", "),
        if uneven.len() == 1 { "it" } else { "them" }
    )))
}

/// The groups of a rank in a mesh.
#[derive(Debug)]
pub struct MeshGroups {
    /// The mesh.
    pub mesh: Mesh,
    /// Ranks with the same part of the layers.
    pub data: Group,
    /// Ranks with the same batch.
    pub tensor: Group,
}

impl MeshGroups {
    /// The groups of this rank of `world`.
    ///
    /// # Errors
    /// Where the mesh has another number of ranks.
    pub fn new(world: &Group, mesh: Mesh) -> Result<Self> {
        if mesh.world() != world.size() {
            return Err(Error::usage(format!(
                "a mesh of {} x {} (data x tensor) does not match {} ranks",
                mesh.data,
                mesh.tensor,
                world.size()
            )));
        }
        Ok(Self {
            mesh,
            data: world.subgroup("data", &mesh.data_ranks(world.rank()))?,
            tensor: world.subgroup("tensor", &mesh.tensor_ranks(world.rank()))?,
        })
    }
}
