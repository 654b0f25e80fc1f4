@file:JvmName("Downloads")

package gemmamtp.download

import gemmamtp.core.FileMetadata
import gemmamtp.core.InputError
import gemmamtp.core.MANIFEST
import gemmamtp.core.readManifestFile
import gemmamtp.core.sha256
import gemmamtp.core.writeWhole
import java.io.File
import java.io.IOException
import java.io.InputStream

/** A manifest is read into memory: a longer one is none. */
private const val MAX_MANIFEST_BYTES = 1 shl 24
private const val MEGABYTE = 1_000_000L
private val SHA256 = Regex("[0-9a-f]{64}")

/** Receives how far a download is. */
public fun interface DownloadProgress {
    /**
     * Called between blocks and before each request; what it throws ends the download, and what was fetched stays.
     *
     * @param done bytes of the files that were fetched, or were here, and digested; it falls after wrong bytes.
     * @param total bytes of all files; 0 before the manifest is here.
     */
    public fun at(done: Long, total: Long)
}

/**
 * How patient a download is with its server.
 *
 * @property connectMillis how long it may take to connect.
 * @property readMillis how long the server may be silent.
 * @property retries how many failures in a row, without a new byte between them, are followed by another try.
 * @property pause waits after each failure.
 */
public class Patience internal constructor(
    public val connectMillis: Int,
    public val readMillis: Int,
    public val retries: Int,
    public val pause: Pause,
    internal val blockBytes: Int,
    internal val usableSpace: (File) -> Long,
) {
    /** Patience with what is usual where nothing else is said. */
    @JvmOverloads
    public constructor(
        connectMillis: Int = 15_000,
        readMillis: Int = 30_000,
        retries: Int = 4,
        pause: Pause = Pause { Thread.sleep(1000L shl minOf(it - 1, 5)) },
    ) : this(connectMillis, readMillis, retries, pause, 1 shl 16, File::getUsableSpace)
}

/** Waits after a failure. */
public fun interface Pause {
    /** Called after so many failures in a row. */
    public fun after(failures: Int)
}

/** Opens a bundle as the app would, and closes it, before it takes the place of the old one. */
public fun interface Trial {
    /** What it throws keeps the old bundle; the next download comes here again without fetching anything. */
    public fun open(bundle: File)
}

/** Files of a bundle that are read in order, such as those of a folder that the user picked. */
public fun interface BundleFiles {
    /** Begin to read a file; null if there is none of this name. Throws what it likes where it cannot be read. */
    public fun open(name: String): InputStream?
}

/**
 * Download a bundle, and put it in place of the one that is there.
 *
 * Files that the old bundle has are copied from it. All bytes are digested, those that an earlier run left as well. The
 * old bundle stays until the new one has opened; decoders that have it open go on with its files. Where the bundle is in
 * place already, nothing is fetched or read: delete it first if it is damaged.
 *
 * @param url address of the folder that has the bundle's files.
 * @param digest hexadecimal sha256 of the manifest, as `export` printed it.
 * @param place directory where the bundle will be; beside it are `PLACE.download`, with what was fetched so far, and
 *     `PLACE.lock`. After an interruption its bundle may be elsewhere until [installedBundle] is called.
 * @param patience how the server is asked.
 * @param progress is told how far it is, and may end it.
 * @param open gets the bundle in another place than [place], where it moves afterwards.
 * @return [place].
 * @throws InputError the server does not have the bundle, cannot be reached, or sends other bytes twice; the bundle does not
 *     fit, is not for this version, or is being downloaded by another; [place] has something else.
 */
@JvmOverloads
public fun downloadBundle(
    url: String,
    digest: String,
    place: File,
    patience: Patience = Patience(),
    progress: DownloadProgress = DownloadProgress { _, _ -> },
    open: Trial,
): File {
    val pinned = digest.lowercase()
    if (!SHA256.matches(pinned)) throw InputError("the digest is '${shown(digest)}', expected the 64 digits that `export` prints")
    return install(Server(url, patience), pinned, place, patience, progress, open)
}

/**
 * Copy a bundle as [downloadBundle] downloads one, with what the app can read in place of a server.
 *
 * @param files of the bundle that is meant, whatever its digest.
 * @throws InputError a file is missing, cannot be read, or is not what the manifest says, or as for a download.
 */
@JvmOverloads
public fun copyBundle(
    files: BundleFiles,
    place: File,
    progress: DownloadProgress = DownloadProgress { _, _ -> },
    open: Trial = Trial {},
): File {
    val source = Local(files)
    var digest = ""
    source.insist(MANIFEST, { 0L }) { digest = sha256(source.open(MANIFEST).use { it.readAll(MAX_MANIFEST_BYTES) }) }
    return install(source, digest, place, Patience(), progress, open)
}

private fun install(
    source: Source,
    digest: String,
    place: File,
    patience: Patience,
    progress: DownloadProgress,
    open: Trial,
): File {
    val folders = Folders(place)
    folders.locked {
        folders.prepare()
        if (folders.hasBundle(digest)) {
            folders.clean()
        } else {
            Download(source, digest, folders, patience, progress).run()
            open.open(folders.aside)
            folders.install()
        }
    }
    return place
}

/** The bundle in a place that [downloadBundle] was given, put back if an interruption left it beside; null if there is none. */
public fun installedBundle(place: File): File? {
    val folders = Folders(place)
    try {
        if (folders.isBeside()) folders.locked(folders::restore)
    } catch (_: InputError) { // it is being replaced now
    }
    return place.takeIf { folders.isBundle() }
}

/** Bytes that are done, of a total. */
internal class Count(private val progress: DownloadProgress) {
    private var done = 0L
    var total = 0L

    fun add(bytes: Long) {
        done += bytes
        progress.at(done, total)
    }
}

/** One download into the folder aside, which has the whole bundle afterwards. */
private class Download(
    private val source: Source,
    private val digest: String,
    private val folders: Folders,
    private val patience: Patience,
    progress: DownloadProgress,
) {
    private val count = Count(progress)
    private val block = ByteArray(patience.blockBytes)

    fun run() {
        folders.begin()
        val files = manifestFiles()
        folders.removeOthers(files)
        checkRoom(files)
        count.total = sum(files.values.map { it.size })
        val local = folders.installedFiles()
        for ((name, metadata) in files) {
            complete(name, metadata, local[metadata.sha256])
            local[metadata.sha256] = File(folders.aside, name) // a bundle may have the same file twice
        }
        folders.finish()
    }

    private fun manifestFiles(): Map<String, FileMetadata> {
        val path = folders.manifest
        if (!path.isFile || sha256(onDisk(path) { path.readBytes() }) != digest) {
            val content = fetchManifest()
            onDisk(path) { writeWhole(path) { it.write(content) } }
        }
        return readManifestFile(path, digest).files.onEach { (name, metadata) -> checkFile(name, metadata) }
    }

    private fun fetchManifest(): ByteArray {
        val address = source.address(MANIFEST)
        var content = ByteArray(0)
        try {
            source.insist(MANIFEST, { 0L }) {
                count.add(0)
                content = source.open(MANIFEST).use { it.readAll(MAX_MANIFEST_BYTES) }
            }
        } catch (error: OtherFile) {
            throw InputError("$address: ${error.message}; check the address", error)
        }
        val actual = sha256(content)
        if (actual != digest) {
            throw InputError("$address: has the sha256 $actual, expected $digest; this is not the bundle that was meant")
        }
        return content
    }

    private fun checkFile(name: String, metadata: FileMetadata) {
        val address = source.address(MANIFEST)
        // Hidden names are the download's own.
        if (name.isEmpty() || name.startsWith(".") || name == MANIFEST || name.any { it in "/\\" || it.isISOControl() }) {
            throw InputError("$address: names the file '${shown(name)}', expected a plain name; export the bundle again")
        }
        if (!SHA256.matches(metadata.sha256)) {
            val found = shown(metadata.sha256)
            throw InputError("$address: the sha256 of $name is '$found', expected 64 hexadecimal digits; export the bundle again")
        }
    }

    private fun checkRoom(files: Map<String, FileMetadata>) {
        val missing = sum(files.map { (name, metadata) -> metadata.size - folders.bytesOf(name, metadata) })
        val free = patience.usableSpace(folders.aside)
        if (missing > free) {
            throw InputError("${folders.place}: needs ${missing / MEGABYTE + 1} MB, ${free / MEGABYTE} MB are free; make room")
        }
    }

    /** Let a file of the bundle be there: from an earlier run, from the old bundle, or from the server. */
    private fun complete(name: String, metadata: FileMetadata, local: File?) {
        val file = File(folders.aside, name)
        val path = folders.part(metadata)
        if (file.exists()) onDisk(file) { if (!file.renameTo(path)) throw IOException("cannot be renamed") }
        Part(path, metadata, count).use { part ->
            part.digestFound(block)
            if (part.moveTo(file)) return
            if (local != null) copy(local, part)
            if (!part.moveTo(file)) fetch(name, part, file)
        }
    }

    /** Copy what a local file has beyond the part. Its bytes may be wrong, and it may not be readable to the end. */
    private fun copy(local: File, part: Part) {
        // Not a hard link, which Android refuses to apps.
        val stream = orNull { local.inputStream() } ?: return
        stream.use {
            if (orNull { it.skip(part.length) } != part.length) return
            while (part.length < part.size) {
                val bytes = orNull { it.read(block, 0, minOf(block.size.toLong(), part.size - part.length).toInt()) } ?: return
                if (bytes < 0) return
                part.write(block, bytes)
            }
        }
    }

    private fun fetch(name: String, part: Part, file: File) {
        val first = fetchOnce(name, part, file) ?: return
        val second = fetchOnce(name, part, file) ?: return
        val both = if (first == second) second else "$second, and before that $first"
        throw InputError("${source.address(name)}: $both; ${source.remedy}")
    }

    /** Fetch what is missing; returns why the server does not have this file, null if it does. */
    private fun fetchOnce(name: String, part: Part, file: File): String? {
        try {
            source.insist(name, part::length) { receive(name, part) }
        } catch (error: OtherFile) {
            return error.message
        }
        val actual = part.sha256
        return if (part.moveTo(file)) null else "has the sha256 $actual, expected ${part.expected}"
    }

    private fun receive(name: String, part: Part) {
        count.add(0)
        if (part.length == part.size) return
        source.open(name, part.length, part.size).use { body ->
            var behind = part.length - body.begin // sent again by a server without ranges
            while (part.length < part.size) {
                val wanted = if (behind > 0) behind else part.size - part.length
                val bytes = body.read(block, minOf(block.size.toLong(), wanted).toInt())
                if (bytes < 0) throw Broken("ended after ${part.length - behind} of ${part.size} bytes")
                if (behind > 0) count.add(0) else part.write(block, bytes)
                if (behind > 0) behind -= bytes
            }
        }
    }
}

private fun <T : Any> orNull(read: () -> T): T? = try { read() } catch (_: IOException) { null }

/** The sum, or the largest number if it is more than that. */
private fun sum(sizes: List<Long>) = sizes.fold(0L) { sum, size -> sum + minOf(size, Long.MAX_VALUE - sum) }

/** What others wrote, for an error of one line. */
internal fun shown(text: String) = text.take(80).map { if (it.isISOControl()) '?' else it }.joinToString("")
