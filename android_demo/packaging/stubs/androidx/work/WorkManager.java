package androidx.work;

import android.content.Context;

public abstract class WorkManager {
    public static native WorkManager getInstance(Context context);

    public native Operation enqueueUniqueWork(String uniqueWorkName, ExistingWorkPolicy policy, OneTimeWorkRequest request);
}
