//! Two-dimensional meshes: the data axis shares out batches and optimiser state, the tensor axis layers.

use std::sync::Arc;
use std::time::Duration;

use super::group::Group;
use super::transport::{Fault, Transport};
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
    /// All ranks.
    pub world: Group,
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
        let all: Vec<usize> = (0..world.size()).collect();
        Ok(Self {
            mesh,
            world: world.subgroup("mesh", &all)?,
            data: world.subgroup("data", &mesh.data_ranks(world.rank()))?,
            tensor: world.subgroup("tensor", &mesh.tensor_ranks(world.rank()))?,
        })
    }
    /// The groups of one rank that has no others, and needs no threads.
    pub fn alone() -> Self {
        let group = || Group::world(Arc::new(Alone));
        Self { mesh: Mesh { data: 1, tensor: 1 }, world: group(), data: group(), tensor: group() }
    }
}

/// Carries nothing: there is nobody to post to.
struct Alone;

impl Transport for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn timeout(&self) -> Duration {
        Duration::MAX
    }

    fn post(&self, to: usize, _: u64, _: &[u8]) -> Result<()> {
        Err(Error::failure(format!("there is no rank {to} that could be sent anything")))
    }

    fn receive(&self, from: usize, _: u64) -> Result<Vec<u8>> {
        Err(Error::failure(format!("there is no rank {from} that could send anything")))
    }

    fn fail(&self, _: &Fault) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_alone_computes_by_itself() {
        let ranks = MeshGroups::alone();
        assert_eq!((ranks.mesh, ranks.world.size()), (Mesh::new(1, 1).unwrap(), 1));
        let (mut sum, mut all) = ([1.5, 2.5], [0; 2]);
        for group in [&ranks.world, &ranks.data, &ranks.tensor] {
            group.all_reduce(&mut sum).unwrap();
            group.all_gather(&mut all, &[3, 4]).unwrap();
            group.barrier().unwrap();
        }
        assert_eq!((sum, all), ([1.5, 2.5], [3, 4]));
        let refused = ranks.world.agree(Err(Error::usage("no"))).unwrap_err();
        assert_eq!(refused.to_string(), "no");
    }
}
