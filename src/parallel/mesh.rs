//! Two-dimensional meshes: the data axis shares out batches and optimiser state, the tensor axis layers.

use std::convert::Infallible;
use std::fmt;
use std::ops::AddAssign;
use std::sync::Arc;
use std::time::Duration;

use bytemuck::Pod;

use super::group::Group;
use super::transport::{Fault, Transport};
use crate::autograd::Shard;
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

    /// Where `rank` is on both axes.
    pub fn place(&self, rank: usize) -> Place {
        let (data, tensor) = self.coordinates(rank);
        Place {
            data: Shard { rank: data, size: self.data },
            tensor: Shard { rank: tensor, size: self.tensor },
        }
    }

    /// Whether every one of these counts, each with its name, can be shared out over the tensor axis.
    ///
    /// # Errors
    /// One message that lists all that cannot.
    pub fn check_divides(&self, counts: &[(&str, usize)]) -> Result<()> {
        check_divides(self.tensor, counts)
    }
}

/// A rank's place on both axes of a mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Its part of batches, parameters and optimiser state.
    pub data: Shard,
    /// Its part of the layers.
    pub tensor: Shard,
}

impl Place {
    /// Whether there are no others.
    pub fn is_alone(&self) -> bool {
        !self.data.is_part() && !self.tensor.is_part()
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {} (data x tensor)", self.data, self.tensor)
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
            return Err(Error::usage(format!("a mesh of {mesh} does not match {} ranks", world.size())));
        }
        let all: Vec<usize> = (0..world.size()).collect();
        Ok(Self {
            mesh,
            world: world.subgroup("mesh", &all)?,
            data: world.subgroup("data", &mesh.data_ranks(world.rank()))?,
            tensor: world.subgroup("tensor", &mesh.tensor_ranks(world.rank()))?,
        })
    }

    /// Takes the weight of images that another rank with the same batch could not read, and of those that it has mixed
    /// and this one has not, or the reverse: `unmixed` are the slots whose partner could not be read here.
    ///
    /// # Errors
    /// A rank that is gone or silent.
    pub fn leave_out_unread(&self, weights: &mut [f32], unmixed: &[usize]) -> Result<()> {
        let size = self.tensor.size();
        if size == 1 || weights.is_empty() {
            return Ok(());
        }
        // The sign tells which images are not mixed.
        unmixed.iter().for_each(|&slot| weights[slot] = -weights[slot]);
        let mut all = vec![0.0; size * weights.len()];
        self.tensor.all_gather(&mut all, weights)?;
        for of_rank in all.chunks_exact(weights.len()) {
            let both = weights.iter_mut().zip(of_rank);
            both.filter(|(weight, other)| weight != other).for_each(|(weight, _)| *weight = 0.0);
        }
        weights.iter_mut().for_each(|weight| *weight = weight.abs());
        Ok(())
    }

    /// Where this rank is.
    pub fn place(&self) -> Place {
        self.mesh.place(self.world.rank())
    }

    /// The groups of one rank that has no others, and needs no threads.
    pub fn alone() -> Self {
        let group = || Group::world(Arc::new(Alone));
        Self { mesh: Mesh { data: 1, tensor: 1 }, world: group(), data: group(), tensor: group() }
    }

    /// Whether there are no other ranks.
    pub fn is_alone(&self) -> bool {
        self.world.size() == 1
    }

    /// Whether this rank is the one that writes and speaks for all.
    pub fn is_first(&self) -> bool {
        self.world.rank() == 0
    }

    /// Whether it is so on any rank: the same answer on all.
    ///
    /// # Errors
    /// Those of [`Group::receive`].
    pub fn any(&self, mine: bool) -> Result<bool> {
        let mut all = vec![0u8; self.world.size()];
        self.world.all_gather(&mut all, &[u8::from(mine)])?;
        Ok(all.contains(&1))
    }

    /// The text of the first rank that has one, on all.
    ///
    /// # Errors
    /// Those of [`Group::receive`].
    pub fn first_text(&self, mine: Option<&str>) -> Result<Option<String>> {
        let mut lengths = vec![0u64; self.world.size()];
        self.world.all_gather(&mut lengths, &[mine.map_or(0, |text| text.len() as u64 + 1)])?;
        let Some(root) = lengths.iter().position(|&length| length > 0) else { return Ok(None) };
        let mut text = vec![0; lengths[root] as usize - 1];
        if let Some(mine) = mine.filter(|_| root == self.world.rank()) {
            text.copy_from_slice(mine.as_bytes());
        }
        self.world.broadcast(&mut text, root)?;
        Ok(Some(String::from_utf8_lossy(&text).into_owned()))
    }

    /// `values` summed over the data ranks, in their order: the same bits on every rank. Of the ranks that share a
    /// batch the first tells.
    ///
    /// # Errors
    /// Those of [`Group::receive`].
    pub fn sum_over_data<T: Pod + AddAssign>(&self, values: &mut [T]) -> Result<()> {
        self.data.all_reduce(values)?;
        self.tensor.broadcast(values, 0)
    }

    /// Ends all ranks with an error of this one, which is not theirs. Returns what all of them report: this error
    /// with the rank's number, or what has ended them before.
    pub fn end(&self, error: Error) -> Error {
        if self.is_alone() {
            return error;
        }
        let Err(error) = self.world.run(|_| Err::<Infallible, _>(error));
        self.world.barrier().err().unwrap_or(error)
    }

    /// `mine` where every rank has one; otherwise the error of the first rank that has none, on every rank: it is
    /// named where others fared better. The ranks are whole after it.
    ///
    /// # Errors
    /// Those of [`Group::receive`], after which the ranks have ended.
    pub fn agree<T>(&self, mine: Result<T>) -> Result<Result<T>> {
        if self.is_alone() {
            return Ok(mine);
        }
        let code = match &mine {
            Ok(_) => 0u8,
            Err(Error::Usage(_)) => 1,
            Err(Error::Failure(_)) => 2,
        };
        let mut codes = vec![0; self.world.size()];
        self.world.all_gather(&mut codes, &[code])?;
        let Some(rank) = codes.iter().position(|&code| code != 0) else { return Ok(mine) };
        let text = mine.err().map(|error| error.to_string());
        let text = self.first_text(text.as_deref())?.unwrap_or_default();
        // Whoever leaves with the error may end the others: by then all know it.
        let _ = self.world.barrier();
        let text = if codes.contains(&0) { format!("rank {rank}: {text}") } else { text };
        Ok(Err(if codes[rank] == 1 { Error::Usage(text) } else { Error::Failure(text) }))
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

    fn fault(&self) -> Option<Fault> {
        None
    }

    fn fail(&self, _: &Fault) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::run_ranks;

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
        assert!(ranks.any(true).unwrap() && !ranks.any(false).unwrap());
        assert_eq!(ranks.first_text(Some("é")).unwrap().as_deref(), Some("é"));
        assert_eq!(ranks.agree(Ok(5)).unwrap().unwrap(), 5);
        assert_eq!(ranks.agree::<()>(Err(Error::failure("no"))).unwrap().unwrap_err().exit_code(), 1);
    }

    #[test]
    fn all_ranks_report_what_ended_them() {
        let told = run_ranks(3, |world| {
            let ranks = MeshGroups::new(world, Mesh::new(3, 1)?)?;
            let error = match world.rank() {
                1 => Error::usage("lost"),
                _ => ranks.any(true).unwrap_err(),
            };
            Ok((ranks.end(error), ranks.any(true).is_err()))
        });
        for (error, ended) in told.unwrap() {
            assert_eq!(
                (error.to_string().as_str(), error.exit_code(), ended),
                ("rank 1 failed: lost", 1, true)
            );
        }
    }

    #[test]
    fn what_ranks_of_a_tensor_axis_have_read_otherwise_does_not_count() {
        let left = run_ranks(2, |world| {
            let ranks = MeshGroups::new(world, Mesh::new(2, 2)?)?;
            // Read by both, by the first alone, by none; mixed by both, by the first alone, by none.
            let mut weights = [1.0, 1.0, 0.0, 1.0, 1.0, 1.0];
            let unmixed = if world.rank() == 0 { &[5][..] } else { &[4, 5] };
            weights[1] = [1.0, 0.0][world.rank()];
            ranks.leave_out_unread(&mut weights, unmixed)?;
            Ok(weights)
        });
        assert_eq!(left.unwrap(), [[1.0, 0.0, 0.0, 1.0, 0.0, 1.0]; 2]);
        let mut alone = [1.0, 0.0];
        MeshGroups::alone().leave_out_unread(&mut alone, &[0]).unwrap();
        assert_eq!(alone, [1.0, 0.0]);
    }

    #[test]
    fn ranks_come_to_one_answer() {
        let answers = run_ranks(3, |world| {
            let ranks = MeshGroups::new(world, Mesh::new(3, 1)?)?;
            let rank = world.rank();
            let any = [ranks.any(rank == 2)?, ranks.any(false)?];
            let text =
                [ranks.first_text((rank > 0).then_some(["", "", "two"][rank]))?, ranks.first_text(None)?];
            let one = ranks.agree(if rank == 1 { Err(Error::usage("bad")) } else { Ok(rank) })?;
            let all = ranks.agree::<()>(Err(Error::failure(format!("from {rank}"))))?;
            // After all this they still are in step.
            let none = ranks.agree(Ok(rank))?;
            Ok((any, text, one.unwrap_err(), all.unwrap_err(), none.unwrap()))
        });
        for (rank, (any, text, one, all, none)) in answers.unwrap().into_iter().enumerate() {
            assert_eq!((any, text, none), ([true, false], [Some(String::new()), None], rank));
            assert_eq!((one.to_string().as_str(), one.exit_code()), ("rank 1: bad", 2));
            assert_eq!((all.to_string().as_str(), all.exit_code()), ("from 0", 1));
        }
    }
}
