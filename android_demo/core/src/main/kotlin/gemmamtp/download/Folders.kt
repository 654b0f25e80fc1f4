package gemmamtp.download

import gemmamtp.core.FileMetadata
import gemmamtp.core.InputError
import gemmamtp.core.MANIFEST
import gemmamtp.core.readManifest
import gemmamtp.core.readManifestFile
import java.io.File
import java.io.IOException
import java.io.RandomAccessFile

/** Locks of this process. The system's is lost when a second channel of its file is closed, so none is opened. */
private val held = HashSet<File>()

/** The place of a bundle, and what is beside it while another comes. */
internal class Folders(given: File) {
    val place: File = given.absoluteFile

    /** Has what was fetched so far. */
    val aside = File(place.parentFile, "${place.name}.download")

    /** The manifest in there, which gets its name last: a directory without one is no bundle. */
    val manifest = File(aside, ".$MANIFEST")

    /** The old bundle, between the moment when it gives way and its removal. */
    private val old = File(place.parentFile, ".old-${place.name}")

    /** Where a file grows. It has the name of its content, so that it never goes on with the bytes of another bundle. */
    fun part(metadata: FileMetadata) = File(aside, ".${metadata.sha256}.part")

    /** Run [work] while no other download does, in any process. */
    fun locked(work: () -> Unit) {
        val file = File(place.parentFile, "${place.name}.lock")
        onDisk(file) { makeDirectory(place.parentFile) }
        val key = file.canonicalFile
        if (!synchronized(held) { held.add(key) }) throw busy()
        try {
            onDisk(file) { RandomAccessFile(file, "rw") }.use {
                onDisk(file) { it.channel.tryLock() } ?: throw busy()
                work()
            }
        } finally {
            synchronized(held) { held.remove(key) }
        }
    }

    private fun busy() = InputError("$place: another download to it is running; wait for its end")

    fun isBundle() = File(place, MANIFEST).isFile

    /** Whether the bundle with this digest is in place, with all its files. */
    fun hasBundle(digest: String) = isBundle() && try {
        readManifest(place, digest)
        true
    } catch (_: InputError) {
        false
    }

    /** Whether the old bundle has given way, and none is in place. */
    fun isBeside() = !isBundle() && File(old, MANIFEST).isFile

    /** Put the old bundle back if an interruption left none in place. */
    fun restore() {
        if (isBeside()) old.renameTo(place)
    }

    /** Undo what was interrupted, and refuse a place that has something other than a bundle. */
    fun prepare() {
        restore()
        if (place.exists() && !isBundle() && place.list()?.isEmpty() != true) {
            throw InputError("$place: is not a bundle, expected one or nothing there; choose another place")
        }
        if (isBundle()) remove(old)
    }

    /** Remove what was fetched. */
    fun clean() = remove(aside)

    /** Files of the bundle that is in place, by their sha256; none if its manifest cannot be read. */
    fun installedFiles(): MutableMap<String, File> {
        val files = try { readManifestFile(File(place, MANIFEST)).files } catch (_: InputError) { emptyMap() }
        return files.entries.associateTo(HashMap()) { (name, metadata) -> metadata.sha256 to File(place, name) }
    }

    /** Bytes of a file that are in the folder aside. */
    fun bytesOf(name: String, metadata: FileMetadata) =
        minOf(metadata.size, maxOf(File(aside, name).length(), part(metadata).length()))

    /** Remove from the folder aside what does not belong to these files. */
    fun removeOthers(files: Map<String, FileMetadata>) {
        val names = files.keys + files.values.map { part(it).name } + manifest.name
        for (file in aside.listFiles().orEmpty()) if (file.name !in names || file.isDirectory) remove(file)
    }

    /** Make the folder aside, which is no bundle then. */
    fun begin() = onDisk(aside) {
        makeDirectory(aside)
        val named = File(aside, MANIFEST)
        if (named.exists() && !named.renameTo(manifest)) throw IOException("$MANIFEST cannot be renamed")
    }

    /** Make the folder aside a bundle. */
    fun finish() = onDisk(aside) {
        if (!manifest.renameTo(File(aside, MANIFEST))) throw IOException("$MANIFEST cannot be renamed")
    }

    /** Put the bundle in place of the old one, which [restore] finds until then. */
    fun install() {
        onDisk(place) {
            if (isBundle() && !place.renameTo(old)) throw IOException("cannot be renamed to ${old.name}")
            if (!aside.renameTo(place)) {
                old.renameTo(place)
                throw IOException("${aside.name} cannot be renamed to it")
            }
        }
        remove(old)
    }

    /** Remove a bundle or a file; what is left of a bundle after an interruption is none. */
    private fun remove(file: File) {
        File(file, MANIFEST).delete()
        file.deleteRecursively()
    }

    private fun makeDirectory(directory: File) {
        if (!directory.isDirectory && !directory.mkdirs()) throw IOException("the directory cannot be made")
    }
}
